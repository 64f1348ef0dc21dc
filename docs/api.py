"Generate the API pages from the package's source: signatures, docstrings, and the comment beside each parameter."

import ast
import io
import json
import re
import tokenize
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from conf import SETTINGS

BLOB = f"{SETTINGS['DEFAULT']['git_url']}/blob/{SETTINGS['DEFAULT']['branch']}"
PACKAGE = Path(__file__).resolve().parents[1] / "agrivision_repro"
ROOMS = ("core", "plots", "data", "losses", "metrics", "models", "analysis", "training", "runs", "predict", "report", "study", "cli")
LONGEST_VALUE = 100  # characters of a constant's value
FOR_TOOLS = re.compile(r"^(fmt|noqa|type|pragma|ruff)\b")


@dataclass(frozen=True)
class Parameter:
    "A parameter of a function, or a field of a class."

    name: str
    type: str
    default: str
    comment: str


@dataclass(frozen=True)
class Module:
    "A module and, if a notebook exports it, the notebook."

    name: str  # dotted, without the package
    title: str = ""  # of its notebook
    page: str = ""  # of its notebook, without suffix; "": a plain module
    cells: dict[str, str] = field(default_factory=dict)  # public name → label of the cell that defines it

    @property
    def path(self) -> Path:
        return PACKAGE / f"{self.name.replace('.', '/')}.py"

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def rank(self) -> tuple:
        "Sort key: rooms from the bottom up; in a room, notebooks in reading order, then plain modules."
        return ROOMS.index(self.name.partition(".")[0]), not self.page, self.page, self.name


def list_modules(exported: list[Module]) -> list[Module]:
    "Return the exported modules and all plain ones, sorted."
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("[a-z]*.py"))
    return sorted([*exported, *(Module(name) for name in set(names) - {m.name for m in exported})], key=lambda m: m.rank)


def read_comments(source: str) -> dict[int, str]:
    "Return the comment of each line, except those for tools."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: re.split(r"\s+#\s*", t.string.lstrip("# "))[0] for t in tokens if t.type == tokenize.COMMENT}
    return {line: text for line, text in comments.items() if not FOR_TOOLS.match(text)}


def public_names(tree: ast.Module) -> list[str]:
    "Read `__all__`, which nbdev writes; in a plain module, return every name without a leading underscore."
    targets = [(node, target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    exported = (ast.literal_eval(node.value) for node, target in targets if ast.unparse(target) == "__all__")
    return next(exported, None) or [name for name in definitions(tree) if not name.startswith("_")]


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    "Return the statement that defines each name at a module's top level."
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
            found |= {name.id: node for name in names if isinstance(name, ast.Name)}
    return found


@cache
def option_types() -> dict[str, ast.expr]:  # name → `Annotated[…]`
    "Read the types of the command's options, which several commands share."
    defined = [item for path in (PACKAGE / "cli").glob("*.py") for item in definitions(ast.parse(path.read_text(encoding="utf-8"))).items()]
    return {name: node.value for name, node in defined if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Annotated[")}


class DropAnnotated(ast.NodeTransformer):
    "`Annotated[X, …]`, or its name → `X`."

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.visit(option_types()[node.id]) if node.id in option_types() else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        is_annotated = ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple)
        return node.slice.elts[0] if is_annotated else node


def code(node: ast.AST | None) -> str:
    "Format a syntax node on one line in conventional style."
    if node is None:
        return ""
    text = " ".join(ast.unparse(DropAnnotated().visit(deepcopy(node))).split())
    return re.sub(r"(?<=\de-)0(?=\d\b)", "", text)


def help_text(annotation: ast.AST | None) -> str:
    "Return the help text of a command-line option, or an empty string."
    annotation = option_types().get(annotation.id, annotation) if isinstance(annotation, ast.Name) else annotation
    keywords = [n for n in ast.walk(annotation) if isinstance(n, ast.keyword) and n.arg == "help"] if annotation else []
    return " ".join(str(n.value.value) for n in keywords if isinstance(n.value, ast.Constant))


def read_parameters(function: ast.FunctionDef, comments: dict[int, str], is_method: bool) -> list[Parameter]:
    "List a function's parameters; a comment belongs to the last one of its line."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    rows = list(zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults, [""] * len(plain), strict=True))
    rows = rows[is_method and "staticmethod" not in decorators(function) :]
    rows += [(a.vararg, None, "*")] if a.vararg else []
    rows += list(zip(a.kwonlyargs, a.kw_defaults, [""] * len(a.kwonlyargs), strict=True))
    rows += [(a.kwarg, None, "**")] if a.kwarg else []
    lines = {(default or arg).end_lineno: arg.arg for arg, default, _ in rows}
    own = {name: comments.get(line, "") for line, name in lines.items() if line != header_end(function) or code(function.returns) == "None"}
    return [
        Parameter(stars + arg.arg, code(arg.annotation), code(default), own.get(arg.arg) or help_text(arg.annotation))
        for arg, default, stars in rows
    ]


def header_end(function: ast.FunctionDef) -> int:
    "Return the last line before a function's body; its comment describes the return value."
    return function.returns.end_lineno if function.returns else function.body[0].lineno - 1


def read_fields(cls: ast.ClassDef, comments: dict[int, str]) -> list[Parameter]:
    "List the fields of a dataclass or named tuple."
    fields = [n for n in cls.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.annotation).startswith("ClassVar")]
    return [Parameter(ast.unparse(n.target), code(n.annotation), code(n.value), comments.get(n.end_lineno, "")) for n in fields]


def decorators(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    return [ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list]


def text_of(markdown: str) -> str:
    "Escape angle brackets, dollar signs, powers and square brackets in a comment; leave code unchanged."
    parts = re.split(r"(`[^`]*`)", re.sub(r'(?<!`)""(?!")', '`""`', " ".join(markdown.split())))
    return "".join(p if p.startswith("`") else re.sub(r"([<$\[\]]|(?<=\w)\*\*(?=\w))", r"\\\1", p) for p in parts)


def parameter_table(parameters: list[Parameter]) -> list[str]:
    "Format the parameters' comments as a table below the signature, if there are any."
    if not any(p.comment for p in parameters):
        return []
    lines = [":::{list-table}", ":header-rows: 1", ":class: parameters", "", "* - Name", "  - Type", "  - Default", "  - Meaning"]
    for p in parameters:
        cells = [f"`{p.name}`", p.type and f"`{p.type}`", p.default and f"`{p.default}`", text_of(p.comment)]
        lines += [f"{'*' if k == 0 else ' '} - {cell}" for k, cell in enumerate(cells)]
    return [*lines, ":::", ""]


def function_entry(node: ast.FunctionDef, comments: dict[int, str], source_link: str, is_method: bool = False) -> list[str]:
    "Describe a function or method."
    marks, parameters = decorators(node), read_parameters(node, comments, is_method)
    is_property = is_method and any(mark in ("property", "cached_property") for mark in marks)
    returns = f" -> {code(node.returns)}" if node.returns else ""
    arguments = code(node.args)
    if is_method and "staticmethod" not in marks:
        arguments = re.sub(r"^\w+(, |$)", "", arguments)
    kind = "property" if is_property else "method" if is_method else "function"
    lines = [f"::::{{py:{kind}}} {node.name}" + ("" if is_property else f"({arguments}){returns}")]
    lines += [f":{mark}:" for mark in marks if mark in ("staticmethod", "classmethod")]
    lines += [f":type: {json.dumps(code(node.returns))}"] if is_property and node.returns else []
    lines += ["", *docstring(node), source_link, "", *([] if is_property else parameter_table(parameters))]
    comment = "" if code(node.returns) == "None" else text_of(comments.get(header_end(node), ""))
    lines += [f"**Returns** {f'`{code(node.returns)}`: ' if node.returns else ''}{comment}", ""] if comment else []
    return [*lines, "::::", ""]


def docstring(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    return [text_of(ast.get_docstring(node) or ""), ""]


def class_entry(node: ast.ClassDef, comments: dict[int, str], source_link: str) -> list[str]:
    "Describe a class: its constructor, then its public methods."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((m for m in methods if m.name == "__init__"), None)
    has_fields = "dataclass" in decorators(node) or any(ast.unparse(base) == "NamedTuple" for base in node.bases)
    parameters = read_parameters(init, comments, True) if init else read_fields(node, comments) if has_fields else []
    arguments = re.sub(r"^\w+(, |$)", "", code(init.args)) if init else ", ".join(field_argument(p) for p in parameters)
    bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
    lines = [f":::::{{py:class}} {node.name}" + (f"({arguments})" if parameters else ""), "", *docstring(node)]
    lines += [f"A kind of {bases}. {source_link}" if bases else source_link, "", *parameter_table(parameters)]
    for method in methods:
        if not method.name.startswith("_") or method.name == "__call__":
            lines += function_entry(method, comments, "", is_method=True)
    return [*lines, ":::::", ""]


def field_argument(p: Parameter) -> str:
    return f"{p.name}: {p.type}" + (f" = {p.default}" if p.default else "")


def constant_entry(name: str, node: ast.Assign | ast.AnnAssign, comments: dict[int, str], source_link: str) -> list[str]:
    "Describe a constant: its value if short, and the comment beside it; of several on a line, the parts of both that belong to it."
    comment, value = comments.get(node.end_lineno) or comments.get(node.lineno) or help_text(node.value), node.value
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        names = [ast.unparse(target) for target in node.targets[0].elts]
        parts, values = comment.split("; "), getattr(value, "elts", [])
        comment = parts[names.index(name)] if len(parts) == len(names) else comment
        value = values[names.index(name)] if len(values) == len(names) else None
    value = code(value)
    lines = [f":::{{py:data}} {name}"]
    lines += [f":type: {json.dumps(code(node.annotation))}"] if isinstance(node, ast.AnnAssign) else []
    lines += [f":value: {json.dumps(value, ensure_ascii=False)}"] if 0 < len(value) <= LONGEST_VALUE else []
    return [*lines, "", text_of(comment), "", source_link, "", ":::", ""]


def entry(name: str, node: ast.stmt, module: Module, comments: dict[int, str]) -> list[str]:
    source_link = f"Defined in {{ref}}`{module.page} <{module.cells[name]}>`." if name in module.cells else f"Defined in {origin(module)}."
    if isinstance(node, ast.ClassDef):
        return class_entry(node, comments, source_link)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return function_entry(node, comments, source_link)
    return constant_entry(name, node, comments, source_link)


def origin(module: Module) -> str:
    "Link a module's notebook, or its source."
    if module.page:
        return f"[{module.title or module.page}](/{module.page}.ipynb)"
    name = module.path.relative_to(PACKAGE.parent)
    return f"[{name}]({BLOB}/{name})"


def module_page(module: Module) -> str:
    "Write the page of a module, with its names in the notebook's order."
    tree, comments = ast.parse(module.source), read_comments(module.source)
    full = f"agrivision_repro.{module.name}"
    lines = [f"# {module.name}", "", f"> {text_of(ast.get_docstring(tree) or '')}", ""]
    lines += [f"{'The notebook' if module.page else 'Source'}: {origin(module)}.", "", f":::{{py:module}} {full}", ":::", ""]
    defined, names = definitions(tree), public_names(tree)
    for name in sorted(names, key=lambda n: defined[n].lineno):
        lines += entry(name, defined[name], module, comments)
    return "\n".join(lines)


def index_page(modules: list[Module]) -> str:
    "Write the index page: modules from the bottom up, then all names from A to Z."
    lines = ["# API", "", "Every public name of `agrivision_repro`: the modules from the bottom up, then all names from A to Z."]
    lines += ["The {ref}`general index <genindex>` also lists the methods.", ""]
    lines += ["```{toctree}", ":hidden:", "", *(m.name for m in modules), "```", ""]
    trees = {m.name: ast.parse(m.source) for m in modules}
    lines += [f"- [{name}]({name}.md): {text_of(ast.get_docstring(tree) or '')}" for name, tree in trees.items()]
    lines += ["", "## All names", ""]
    rows = [(name, module) for module, tree in trees.items() for name in public_names(tree)]
    rows.sort(key=lambda row: (row[0].lower(), row))
    for letter in sorted({name[0].upper() for name, _ in rows}):
        lines += [f"### {letter}", "", ":::{container} names"]
        lines += [f"- {{py:obj}}`{n} <agrivision_repro.{m}.{n}>` · {m}" for n, m in rows if n[0].upper() == letter]
        lines += [":::", ""]
    return "\n".join(lines)


def write_api(modules: list[Module], folder: Path) -> None:
    "Write all pages of the API as Markdown."
    folder.mkdir(parents=True)
    (folder / "index.md").write_text(index_page(modules), encoding="utf-8")
    for module in modules:
        (folder / f"{module.name}.md").write_text(module_page(module), encoding="utf-8")
