"""One record of a run feeds everything that shows it.

    record = Record.new("compare", settings=..., results=..., model=..., seed=0)
    record.save("run.json")                   one JSON file; Record.load reads it back
    print_record(record)                      tables on the terminal
    save_html(record, "run.html")             one page, no network, light and dark
    save_figure(figure_cost(record), "cost.svg")
    write_table(record, "run.parquet")        a number per layer and head, CSV or Parquet

`tempering.reports.sections` describes what `results` may hold. Names load on first use, so that
writing a record needs no matplotlib.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
