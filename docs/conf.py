"Sphinx's settings: notebooks with their saved outputs, equations as MathML, no external resources."

import re
from configparser import ConfigParser
from functools import cache, partial
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util.osutil import relative_uri

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
def tree_of_titles(builder, **options) -> str:
    "Render the sidebar of the front page."
    return builder._get_local_toctree("index", **options)


def point_from(tree: str, page: str, builder) -> str:
    "Point the links of the front page's sidebar from another page, and mark the entry of that page and those around it."
    here = builder.get_target_uri(page)
    tree = re.sub(r'href="([^"#]+)"', lambda link: f'href="{relative_uri(here, link[1]) or "#"}"', tree)
    around: list[int] = []  # where the lists and entries around the link to this page begin, from outside
    for tag in re.finditer(r'<(/?)(?:ul|li)\b|href="#"', tree):
        if tag[1] is None:
            break
        around.pop() if tag[1] else around.append(tag.start())
    for start in reversed(around):
        is_innermost = start == around[-1]
        tree = tree[:start] + mark(tree[start:], is_innermost)
    return tree


def mark(rest: str, is_innermost: bool) -> str:
    "Mark the list or entry with which a part of the sidebar begins."
    if rest.startswith("<ul"):
        return rest.replace("<ul>", '<ul class="current">', 1)
    rest = re.sub(r'"(toctree-l\d)([^"]*)"', rf'"\1 current\2{" current-page" * is_innermost}"', rest, count=1)
    rest = rest.replace('<a class="', '<a class="current ', 1) if is_innermost else rest
    has_own = "has-children" in rest.partition(">")[0]
    return rest.replace(' class="toctree-checkbox"', ' checked="" class="toctree-checkbox"', 1) if has_own else rest


def make_one_sidebar(app, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    "Let the theme make the sidebar once: Sphinx would copy every heading of the site for each page, and the theme parse it."
    context["toctree"] = partial(tree_of_titles, app.builder)


def point_sidebar(app, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    "Point the sidebar from its page."
    context["furo_navigation_tree"] = point_from(context["furo_navigation_tree"], page, app.builder)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("html-page-context", make_one_sidebar, priority=400)  # before the theme makes its sidebar
    app.connect("html-page-context", point_sidebar, priority=600)
