"""What reports are made of: Markdown and its page, and figures. Evals, campaign and bench use it."""
