"""``report.html``: a training run on one page, which needs no network and no scripts."""

from jlora.ui.report.page import write_report

__all__ = ["write_report"]
