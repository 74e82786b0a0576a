"""The report: one page, with tables and figures, of how runs hold up as modalities go missing."""

from runs.report.page import make_report

__all__ = ["make_report"]
