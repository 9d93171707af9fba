"""``report.html``: a training run on one page, which needs no network and no scripts."""

from jlora.ui.report.page import report_html, write_report

__all__ = ["report_html", "write_report"]
