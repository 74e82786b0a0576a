"""The report: one page, with tables and figures, of how runs hold up as modalities go missing."""

from report.page import make_report

__all__ = ["make_report"]
