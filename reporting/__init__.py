"""Markdown, HTML pages and figures for the reports of evals, campaign and bench."""
