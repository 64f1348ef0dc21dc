"Sphinx's settings: notebooks with their saved outputs, equations as MathML, no external resources."

from configparser import ConfigParser
from functools import cache
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.environment import BuildEnvironment

SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(Path(__file__).resolve().parents[1] / "settings.ini", encoding="utf-8")

project = SETTINGS["DEFAULT"]["title"]
author = SETTINGS["DEFAULT"]["author"]
copyright = SETTINGS["DEFAULT"]["copyright"]
release = SETTINGS["DEFAULT"]["version"]

extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they would be loaded from another site
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {
    "footer_icons": [{"name": "source", "url": SETTINGS["DEFAULT"]["git_url"], "html": "Source", "class": ""}],
}


def write_math(writer, node: nodes.Element) -> None:
    "Write an equation as inline or block MathML."
    is_block = isinstance(node, nodes.math_block)
    mathml = convert(node.astext().strip(), display="block" if is_block else "inline")
    writer.body.append(f'<div class="equation">{mathml}</div>\n' if is_block else mathml)
    raise nodes.SkipNode


@cache
def page_titles(env: BuildEnvironment) -> dict[str, nodes.bullet_list]:
    "Return the contents of each page without what stands below its title, but with the pages that it lists."
    tocs = {page: toc.deepcopy() for page, toc in env.tocs.items()}
    for entry in (entry for toc in tocs.values() for entry in toc if len(entry) > 1):
        listed = list(entry.findall(addnodes.toctree))
        entry[1:] = [nodes.bullet_list("", *listed)] if listed else []
    return tocs


def make_sidebar_of_titles(app, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    "Let the sidebar, which shows titles only, be made of these: Sphinx copies every heading and name of the site for each page."
    make, env = context["toctree"], app.env

    def make_of_titles(**options) -> str:
        whole, env.tocs = env.tocs, page_titles(env)
        try:
            return make(**options)
        finally:
            env.tocs = whole

    context["toctree"] = make_of_titles


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("html-page-context", make_sidebar_of_titles, priority=400)  # before the theme makes its sidebar
