"""Examples in the guides write their files into a folder of their own.

Those of an extra that is not installed are skipped.
"""

import pytest


@pytest.fixture(autouse=True)
def _own_folder(request, tmp_path_factory, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        if request.node.path.name == "diffusers.md":
            pytest.importorskip("diffusers")
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
