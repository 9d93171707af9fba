"""docs/configuration.md matches the output of docs/configuration.py."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs" / "configuration.py"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("configuration_page", SCRIPT)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.TARGET.read_text(encoding="utf-8") == page.render()
