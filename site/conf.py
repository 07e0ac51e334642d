"""Sphinx configuration of the book; `make site` runs it on build/site/source."""

import os
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

BASE = os.environ.get("SITE_URL", "https://klrb.github.io/klrb/").rstrip("/") + "/"
REPOSITORY = os.environ.get("SITE_REPOSITORY", "https://github.com/klrb/klrb")

project = "klrb"
author = "klrb developers"
copyright = "klrb developers"
html_title = "klrb: the KL between language models"
extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "sphinxcontrib.bibtex",
    "sphinx_proof",
    "sphinx_copybutton",
]
root_doc = "index"
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "colon_fence", "html_image", "attrs_inline"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "alpha"
add_module_names = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
nitpicky = False

html_theme = "sphinx_book_theme"
html_theme_options = {
    "repository_url": REPOSITORY,
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
html_favicon = "static/klrb.svg"
html_static_path = ["static"]
html_css_files = ["klrb.css"]
html_js_files = ["klrb.js"]
html_baseurl = BASE
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {
    "options": {"enableMenu": False},
    "tex": {"tags": "none"},
    "chtml": {"matchFontHeight": False},
}
copybutton_exclude = ".linenos, .gp, .go"


def add_mathjax(app, exception):
    "Formulas are set by the site itself: the script and its fonts are copied from the package."
    if exception or app.builder.name != "html":
        return
    files = distribution("sphinx-mathjax-offline").files
    script = next(o for o in files if o.name == "tex-chtml.js").locate()
    target = Path(app.outdir) / "_static" / "mathjax"
    fonts = Path("output/chtml/fonts/woff-v2")
    shutil.copytree(Path(script).parent / fonts, target / fonts, dirs_exist_ok=True)
    shutil.copy(script, target)


def add_explorer(app, pagename, templatename, context, doctree):
    "The interactive page has its data in itself: a page read from a file may not fetch any."
    if pagename != "prefix_explorer":
        return
    data = (HERE / "prefix_explorer.json").read_text(encoding="utf-8").replace("</", "<\\/")
    app.add_js_file(None, body=data, type="application/json", id="prefix-data")
    app.add_js_file("prefix_explorer.js", loading_method="defer")


def add_sitemap(app, exception):
    if exception or app.builder.name != "html":
        return
    pages = sorted(o for o in app.env.found_docs if o != "index")
    lines = [BASE, *(f"{BASE}{o}.html" for o in pages)]
    body = "".join(f"  <url><loc>{o}</loc></url>\n" for o in lines)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    space = "http://www.sitemaps.org/schemas/sitemap/0.9"
    text = f'{head}<urlset xmlns="{space}">\n{body}</urlset>\n'
    (Path(app.outdir) / "sitemap.xml").write_text(text, encoding="utf-8")
    (Path(app.outdir) / ".nojekyll").touch()


def add_not_found(app, exception):
    "A host serves it under any address, so its links start at the root of the site."
    if exception or app.builder.name != "html":
        return
    text = (HERE / "404.html").read_text(encoding="utf-8")
    (Path(app.outdir) / "404.html").write_text(text.replace("{{ base }}", BASE), encoding="utf-8")


def setup(app):
    app.connect("html-page-context", add_explorer)
    for step in (add_mathjax, add_sitemap, add_not_found):
        app.connect("build-finished", step)
