"""Tables and plots of a comparison, from its folder. Runs no model; drawing needs matplotlib.

Reading order: `table` (columns and how a number is written), `plots`, `page` (report.md).
"""

from prefixtune.report.page import missing_cells, read_results, write_report
from prefixtune.report.plots import require_matplotlib
from prefixtune.report.table import Column, columns_of

__all__ = ["Column", "columns_of", "missing_cells", "read_results", "require_matplotlib", "write_report"]
