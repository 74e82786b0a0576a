"""The report: a page of tables and figures on how well runs hold up when modalities are missing."""

from runs.report.page import make_report

__all__ = ["make_report"]
