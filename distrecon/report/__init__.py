"""What a finished run shows: tables, figures, one page. `report.figures` is the only file that imports matplotlib."""
