"""The documentation's site: `python -m sphinx -W docs build/docs`, with the extra docs.

`tools/docs_site.py` makes what comes from the code: the API, the commands and the configurations.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tools`

from lco_jax import __version__

project = "lco-jax"
author = "The lco-jax authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "tools.docs_site"]
myst_heading_anchors = 3  # links such as training.md#data, as GitHub makes them
default_role = "literal"  # docstrings write `name`
smartquotes = False  # --flag stays what one types

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
html_title = "lco-jax"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
