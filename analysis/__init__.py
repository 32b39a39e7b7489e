"""Studies, and tables and pictures from finished runs."""
