"""``report.html``: a run on one page that opens anywhere, offline and without scripts."""

from jlora.ui.report.page import write_report

__all__ = ["write_report"]
