"""raylift: a 3-D CT volume from one to eight radiographs (X-rays); the platform to train, search and serve such models.

The package is spread over the top folders of the repository (datasets, models, platform, tune_spaces, serve). An
installed wheel holds them inside this folder; in a checkout they are next to it, and this file makes them importable
as `raylift.<folder>`.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "models").is_dir():
    __path__.append(str(_here.parent))
