"""Building blocks that recipes share."""
