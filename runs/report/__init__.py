"""The report: a page of tables and figures on how well runs hold up when modalities are missing."""
