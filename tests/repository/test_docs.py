"The site holds every notebook and every public name, its links lead somewhere, and it fetches nothing."

import ast
import importlib
import json
import re
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from forked import run

from agrivision_repro.report.render import NOTHING_LEARNED
from agrivision_repro.report.results import list_results

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
from api import constant_entry, definitions, list_modules, public_names, read_comments  # noqa: E402

MODULES = list_modules([])
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Page(HTMLParser):
    "What a page links to, what it fetches, its anchors, its equations, and the text that is not code."

    def __init__(self, html: str):
        super().__init__()
        self.links, self.fetched, self.anchors, self.n_equations, self.text, self.skipped = [], [], {""}, 0, [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.n_equations += tag == "math"
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get(FETCHED.get(tag)):
            self.fetched.append(values[FETCHED[tag]])
        self.fetched += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style") or "")
        if tag in ("pre", "code", "script", "style", "math"):
            self.skipped.append(tag)

    def handle_endtag(self, tag):
        if self.skipped and self.skipped[-1] == tag:
            self.skipped.pop()

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


@cache
def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built once, whichever process asks first."
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    with FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            done = run(ROOT / "docs" / "build.py", shared / "site", cwd=ROOT)
            assert done.returncode == 0, done.stderr[-3000:]
    return shared / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: read_page(path) for path in sorted(site.rglob("*.html"))}


def broken_links(pages: dict[Path, Page], site: Path) -> list[str]:
    "Name every link within the site that leads to no page, or to no place on it."
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_there = target.is_file() and target.is_relative_to(site)
            if not is_there or (target.suffix == ".html" and unquote(parts.fragment) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def outside(pages: dict[Path, Page], site: Path) -> list[str]:
    "Name everything that a page or a style sheet would fetch from elsewhere."
    found = [f"{path.name}: {url}" for path, page in pages.items() for url in page.fetched if re.match(r"(\w+:)?//", url)]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.name}: {url}" for url in urls]
    return found


def raw_equations(page: Page) -> list[str]:
    return re.findall(r"\$\$|\$\S[^$\n]*\$|\\(?:frac|sum|text|sigma|mu|begin|hat)", "".join(page.text))


def test_every_notebook_has_a_page_in_the_sidebar(site, pages):
    wanted = {p.relative_to(NBS).with_suffix(".html") for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert len(wanted) > 30
    sidebar = {(site / urlsplit(link).path).resolve() for link in pages[site / "index.html"].links} | {site / "index.html"}
    assert {site / page for page in wanted} <= set(pages) & sidebar


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_every_public_name_is_in_the_api(module, site, pages):
    "In the inventory, at an anchor that is there; and in the list from A to Z."
    full = f"agrivision_repro.{module.name}"
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    places = {name: place for name, kind, _, place, _ in (line.split(" ", 4) for line in lines) if kind.startswith("py:")}
    listed = {link.rpartition("#")[2] for link in pages[site / "api" / "index.html"].links}
    names = public_names(ast.parse(module.source))
    assert names and all(hasattr(importlib.import_module(full), name) for name in names)
    for name in (f"{full}.{n}" for n in names):
        path, _, anchor = places[name].partition("#")
        assert anchor.replace("$", name) in pages[site / path].anchors and name in listed


def test_a_parameter_says_what_its_comment_says(site):
    "Shape, type, default, comment and what is returned; and the place of the cell."
    html = (site / "api" / "models.norms.html").read_text(encoding="utf-8")
    entry = html[html.index('id="agrivision_repro.models.norms.normalize"') : html.index('id="agrivision_repro.models.norms.pool_moments"')]
    text = " ".join(re.sub(r"<[^>]+>", " ", entry).split())
    assert "eps float 1e-5 added to the variance" in text and "weight Tensor gamma, (C,)" in text and "Returns Tensor : like x" in text
    assert re.search(r'href="\.\./20_norms\.html#norms-\d+"', entry)


def test_constants_of_one_line_have_their_own_values_and_comments():
    source = "A, B = 1, 2  # one; two\nC = {  # name → what\n    'x': 3,\n}\nC.y = 1\n"
    defined, comments = definitions(ast.parse(source)), read_comments(source)
    entries = {name: " ".join(constant_entry(name, defined[name], comments, "")) for name in "ABC"}
    assert ':value: "2"' in entries["B"] and " two " in entries["B"] and " one " not in entries["B"]
    assert "name → what" in entries["C"] and "'x': 3" in entries["C"]


def test_options_of_the_command_say_what_their_help_says(site):
    page = (site / "api" / "cli.data.html").read_text(encoding="utf-8")
    assert page.count("Folder of the data set.") >= 4 and "_Root" not in page


def test_every_executed_notebook_has_a_page_that_says_how_it_was_made(site, pages):
    "Each folder of results is in the sidebar, with its facts; its notebooks show outputs, the command, the time and the device."
    folders = list_results(ROOT / "results")
    assert folders
    sidebar = {(site / urlsplit(link).path).resolve() for link in pages[site / "index.html"].links}
    for name, about in folders.items():
        folder = site / "results" / name
        text = " ".join("".join(pages[folder / "index.html"].text).split())
        assert folder / "index.html" in sidebar and f"{about['n_train']:,} for training" in text and about["trained"][0] in text
        for path in (ROOT / "results" / name / "notebooks").glob("*.ipynb"):
            html = (folder / f"{path.stem}.html").read_text(encoding="utf-8")
            words = " ".join(re.sub(r"<[^>]+>", "", html).split())
            assert f"agrivision reproduce {path.stem} --scale {about['scale']} --data {about['data']}" in words
            assert all(device in words for device in about["device"]) and re.search(r"\d+ runs, (\d+ h )?\d+ (min|s) together", words)
            links = pages[site / "tables" / path.with_suffix(".html").name].links
            assert "cell_output" in html and f"../results/{name}/{path.stem}.html" in links


def test_llms_txt_lists_every_notebook_and_the_full_text_has_them(site, pages):
    "The format of llmstxt.org: a title, a quote, sections of links to pages that exist, each with a sentence."
    title, quote, *sections = (site / "llms.txt").read_text(encoding="utf-8").split("\n\n")
    assert title == "# agrivision_repro" and quote.startswith("> A notebook companion")
    assert sections[::2] and all(re.fullmatch(r"## [^\n]+", heading) for heading in sections[::2])
    links = [re.fullmatch(r"- \[(.+)\]\(([^)]+)\): (.+)", line) for part in sections[1::2] for line in part.strip().split("\n")]
    assert all(links) and {site / link[2] for link in links} <= set(pages)
    notebooks = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.stem != "index"]
    assert {str(p.relative_to(NBS).with_suffix(".html")) for p in notebooks} <= {link[2] for link in links}
    full = (site / "llms-full.txt").read_text(encoding="utf-8")
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all("".join(cell["source"]).strip() in full for cell in cells), path
    assert "iVBORw0KGgo" not in full  # pictures are outputs


def test_no_page_shows_a_smoke_run(site):
    assert [path for path in site.rglob("*.html") if NOTHING_LEARNED in path.read_text(encoding="utf-8")] == []


def test_each_page_is_marked_in_its_sidebar(site):
    "It alone, by a link to itself; the list that it stands in is open."
    marked = '<li class="toctree-l{} current{} current-page"><a class="current reference internal" href="#">{}</a>'
    for name, level, own, title in (("20_norms", 1, "", "Norms"), ("api/index", 1, " has-children", "API"), ("api/core", 2, "", "core")):
        tree = (site / f"{name}.html").read_text(encoding="utf-8").partition('<div class="sidebar-tree">')[2].partition("</div>")[0]
        assert tree.count("current-page") == 1 and marked.format(level, own, title) in tree, name
        assert tree.count(' checked=""') == name.startswith("api/")


def test_links_within_the_site_lead_somewhere(site, pages):
    assert broken_links(pages, site.resolve()) == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    assert outside(pages, site) == []


def test_equations_are_mathml(site, pages):
    assert pages[site / "20_norms.html"].n_equations > 10
    assert {path.name: found for path, page in pages.items() if (found := raw_equations(page))} == {}


def test_directives_and_hidden_cells_are_left_out(site):
    for path in site.rglob("*.html"):
        assert not re.search(r"#\s*\|\s*(export|default_exp|eval|hide)", re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))), path
    assert "to_markdown" not in (site / "index.html").read_text(encoding="utf-8")


def test_the_checks_can_fail(tmp_path):
    "A page with one fault of each kind."
    html = '<p id="here">$$\\frac12$$ <code>$$</code><a href="#here"></a><a href="#gone"></a><a href="gone.html"></a>'
    (tmp_path / "a.html").write_text(f'{html}<a href="https://a.b"></a><img src="//a.b/c.png"><script src="https://a.b/c.js"></script>')
    (tmp_path / "a.css").write_text("@import url(https://a.b/c.css); b { background: url(data:image/png;base64,) }")
    pages = {tmp_path / "a.html": read_page(tmp_path / "a.html")}
    assert [b.removeprefix("a.html: ") for b in broken_links(pages, tmp_path)][:2] == ["#gone", "gone.html"]
    assert outside(pages, tmp_path) == ["a.html: //a.b/c.png", "a.html: https://a.b/c.js", "a.css: https://a.b/c.css"]
    assert raw_equations(pages[tmp_path / "a.html"]) == ["$$", "\\frac", "$$"]


def test_a_notebook_in_no_part_and_a_link_to_no_file_are_refused(tmp_path, monkeypatch):
    import build

    assert build.link_outwards("[a](../CONTRIBUTING.md), [b](20_norms.ipynb#x)", NBS) == (
        "[a](https://github.com/agrivision-repro/agrivision_repro/blob/main/CONTRIBUTING.md), [b](/20_norms.ipynb#x)"
    )
    for text in ("[a](gone.md)", f"{build.BLOB}/gone.md"):
        with pytest.raises(ValueError, match="no such file"):
            build.link_outwards(text, NBS)
    (tmp_path / "index.ipynb").touch()
    monkeypatch.setattr(build, "NBS", tmp_path)
    assert build.sort_notebooks() == {}
    (tmp_path / "extra.ipynb").touch()
    with pytest.raises(ValueError, match="extra.ipynb"):
        build.sort_notebooks()


def missing_files(text: str, folder: Path) -> list[str]:
    "Name the relative links of a Markdown file that lead to no file."
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    links = [*re.findall(r"\]\(\s*<?([^)\s>]+)", prose), *re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.M)]
    links = [urlsplit(link) for link in links]
    return [link.path for link in links if not link.scheme and link.path and not (folder / unquote(link.path)).exists()]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY_LICENSES.md", "CHANGELOG.md"])
def test_relative_links_of_the_repository_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert missing_files(text, ROOT) == []
    assert missing_files(f"{text}\n\n[gone](gone.md#x)", ROOT) == ["gone.md"]
