"""Train the documented runs on one stream, measure and compare them, and draw and report the results."""
