"""The public names of `tempering.reports`; `__init__.py` reads them."""

from .figures import FIGURES as FIGURES
from .figures import figure_benefit as figure_benefit
from .figures import figure_cost as figure_cost
from .figures import figure_depth as figure_depth
from .figures import figure_frontier as figure_frontier
from .figures import figure_pattern as figure_pattern
from .figures import figure_pattern_heatmap as figure_pattern_heatmap
from .figures import figure_reliability as figure_reliability
from .figures import figure_repair as figure_repair
from .figures import figure_stages as figure_stages
from .figures import figure_support_by_layer as figure_support_by_layer
from .figures import figure_support_change as figure_support_change
from .figures import figure_support_heatmap as figure_support_heatmap
from .figures import figure_training as figure_training
from .figures import figure_trials as figure_trials
from .figures import save_figure as save_figure
from .html import render_html as render_html
from .html import save_html as save_html
from .progress_bar import Bar as Bar
from .progress_bar import progress as progress
from .record import Record as Record
from .tables import long_format as long_format
from .tables import write_table as write_table
from .terminal import print_grid as print_grid
from .terminal import print_record as print_record
from .terminal import sparkline as sparkline
