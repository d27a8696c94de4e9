"""The documented runs together: trained on one stream, measured alike, compared, drawn and reported."""
