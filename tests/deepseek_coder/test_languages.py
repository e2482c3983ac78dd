"""Languages by file name; pygments' own file patterns are the oracle where it knows a language."""

import pytest
from pygments.lexers import get_all_lexers, get_lexer_by_name
from pygments.token import Comment
from pygments.util import ClassNotFound

from deepseek_coder.languages import LANGUAGES, comment_line, language_of

# The paper's 87, as printed there.
PAPER = """Ada, Agda, Alloy, ANTLR, AppleScript, Assembly, Augeas, AWK, Batchfile, Bluespec, C, C#, C++, Clojure, CMake,
CoffeeScript, Common Lisp, CSS, CUDA, Dart, Dockerfile, Elixir, Elm, Emacs Lisp, Erlang, F#, Fortran, GLSL, Go, Groovy,
Haskell, HTML, Idris, Isabelle, Java, Java Server Pages, JavaScript, JSON, Julia, Jupyter Notebook, Kotlin, Lean,
Literate Agda, Literate CoffeeScript, Literate Haskell, Lua, Makefile, Maple, Mathematica, MATLAB, OCaml, Pascal, Perl,
PHP, PowerShell, Prolog, Protocol Buffer, Python, R, Racket, RMarkdown, Ruby, Rust, SAS, Scala, Scheme, Shell,
Smalltalk, Solidity, SPARQL, SQL, Stan, Standard ML, Stata, SystemVerilog, Tcl, Tcsh, TeX, Thrift, TypeScript, Verilog,
VHDL, Visual Basic, XSLT, Yacc, YAML, Zig"""

# Where pygments uses another name, or has several lexers.
LEXERS = {
    "ANTLR": ("ANTLR With Java Target",),
    "Assembly": ("NASM", "GAS"),
    "AWK": ("Awk",),
    "Dockerfile": ("Docker",),
    "Emacs Lisp": ("EmacsLisp",),
    "Fortran": ("Fortran", "FortranFixed"),
    "Idris": ("Idris", "Literate Idris"),
    "Java Server Pages": ("Java Server Page",),
    "MATLAB": ("Matlab",),
    "Pascal": ("Delphi",),
    "R": ("S",),
    "Shell": ("Bash",),
    "SystemVerilog": ("systemverilog",),
    "TeX": ("TeX", "BibTeX"),
    "Verilog": ("verilog",),
    "VHDL": ("vhdl",),
    "Visual Basic": ("VB.net", "VBScript"),
}
# pygments has no lexer for these.
UNKNOWN_TO_PYGMENTS = {"Bluespec", "Jupyter Notebook", "Literate CoffeeScript", "RMarkdown", "Yacc"}

# Patterns of pygments that we leave alone: owned by languages outside of the 89, outputs, or too rare to be sure of.
DECLINED = """
shared with more frequent foreign owners:
    *.cl *.pro *.ecl *.inc *.mm *.mi *.sc *.cp *.es *.module *.tac *.S
program output, lists and locks:
    *.aux *.toc Pipfile.lock .Rhistory .Renviron *.cdf *.jsonl *.ndjson *.xc
dialects, templates and build files that are not the language itself:
    *.eex *.leex *.rvt *.rs.in *.sage *.pye *.jy *.bzl BUILD BUILD.bazel BUCK WORKSPACE *.wlua *.idc *.x[bp]m *.xpl
    *.ebuild *.eclass *.exheres-0 *.exlib *.rbx *.duby *.cppm *.ixx *.mxx *.tpp
patterns that are not a name or an extension:
    Makefile.* bash_* .bash_* bashrc zshrc kshrc *.php[345]
"""


def test_the_list_is_the_papers_and_two():
    names = [language.name for language in LANGUAGES]
    paper = [name.strip() for name in PAPER.replace("\n", " ").split(",")]
    assert len(paper) == 87
    assert names == [*paper, "Markdown", "reStructuredText"]


def test_no_two_languages_claim_a_name():
    extensions = [extension for language in LANGUAGES for extension in language.extensions]
    filenames = [name for language in LANGUAGES for name in language.filenames]
    assert len(extensions) == len(set(extensions))
    assert len(filenames) == len(set(filenames))
    assert all(extension.startswith(".") for extension in extensions)
    assert all(language.extensions for language in LANGUAGES)


def test_pygments_agrees():
    patterns = {name: found for name, _, found, _ in get_all_lexers()}
    claims: dict[str, set[str]] = {}
    for language in LANGUAGES:
        lexers = LEXERS.get(language.name, (language.name,))
        assert any(lexer in patterns for lexer in lexers) == (language.name not in UNKNOWN_TO_PYGMENTS), language.name
        for lexer in lexers:
            for pattern in patterns.get(lexer, ()):
                claims.setdefault(pattern, set()).add(language.name)
    assert len(claims) > 200
    for pattern, names in claims.items():
        ours = language_of(pattern.replace("*", "dir/name", 1))
        if ours is None:
            assert pattern in DECLINED.split(), pattern
        else:
            assert ours.name in names or pattern == "*.pl", (pattern, ours.name, names)
    for pattern in ("*.py", "*.cpp", "*.rs", "*.f90", "*.adb", "CMakeLists.txt", "Dockerfile"):
        assert claims[pattern] == {language_of(pattern.replace("*", "x")).name}


# Languages whose examples carry a name that we give to another language (languages.py says why), and dialects.
SHARED = {
    "Assembly": {"ca65 assembler"},
    "Clojure": {"ClojureScript"},
    "Common Lisp": {"NewLisp"},
    "JavaScript": {"JSX"},
    "Lean": {"Lean4"},
    "MATLAB": {"Objective-C"},
    "Perl": {"cplint", "TADS 3"},
    "PHP": {"HTML+PHP"},
    "SQL": {"SQL+Jinja", "Transact-SQL"},
    "TeX": {"OpenEdge ABL"},
    "TypeScript": {"TSX"},
    "Verilog": {"Rocq Prover"},
    "Visual Basic": {"CBM BASIC V2", "QBasic"},
}
WITHOUT_EXAMPLE = {"Augeas", "Bluespec", "Jupyter Notebook", "Literate CoffeeScript", "RMarkdown", "SAS", "Stata"}
WITHOUT_EXAMPLE |= {"Tcl", "Yacc"}


@pytest.mark.network
def test_pygments_example_files(source):
    """Every example file has a language of ours if its folder is one, and no other."""
    seen = {}
    for path in source("pygments==2.21.0"):
        _, inside, example = path.partition("tests/examplefiles/")
        alias, slash, name = example.partition("/")
        if not inside or not slash or name.endswith(".output"):
            continue
        try:
            lexer = get_lexer_by_name(alias).name
        except ClassNotFound:
            continue
        language = language_of(name)
        if language is not None:
            known = {language.name, *LEXERS.get(language.name, ()), *SHARED.get(language.name, ())}
            assert lexer in known, path
            seen.setdefault(language.name, set()).add(lexer)
    assert {language.name for language in LANGUAGES} - seen.keys() == WITHOUT_EXAMPLE
    assert {name: lexers & SHARED[name] for name, lexers in seen.items() if name in SHARED} == SHARED


# Their lexers have no comments at all, take text outside of code blocks for the language, or `<%--` for Java.
COMMENT_UNKNOWN_TO_PYGMENTS = {"Java Server Pages", "JSON", "Literate Agda", "Literate Haskell", "Markdown"}


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_the_comment_sign_is_a_comment(language):
    path = f"dir/name{language.extensions[0]}"
    line = comment_line(path, path)
    assert path in line
    names = {name: aliases[0] for name, aliases, *_ in get_all_lexers() if aliases}
    if language.name in UNKNOWN_TO_PYGMENTS | COMMENT_UNKNOWN_TO_PYGMENTS:
        return
    lexer = get_lexer_by_name(names[LEXERS.get(language.name, (language.name,))[0]])
    start = "<?php\n" if language.name == "PHP" else ""
    tokens = [(kind, text) for kind, text in lexer.get_tokens(f"{start}{line}\n") if text.strip() and text != start]
    assert all(kind in Comment for kind, text in tokens), tokens


@pytest.mark.parametrize(
    "path, name",
    [
        ("src/a.py", "Python"),
        ("a.PY", "Python"),
        ("x/analysis.R", "R"),
        ("x/analysis.r", "R"),
        ("a.C", "C++"),
        ("a.c", "C"),
        ("a.h", "C"),
        ("a.m", "MATLAB"),
        ("a.pl", "Perl"),
        ("a.v", "Verilog"),
        ("a.test.js", "JavaScript"),
        ("a.d.ts", "TypeScript"),
        ("docs/a.lagda.md", "Literate Agda"),
        ("docs/a.coffee.md", "Literate CoffeeScript"),
        ("docs/a.md", "Markdown"),
        ("docker/Dockerfile", "Dockerfile"),
        ("CMakeLists.txt", "CMake"),
        ("Makefile", "Makefile"),
        (".bashrc", "Shell"),
        ("a.tar.gz", None),
        ("notes.txt", None),
        (".py", None),
        ("py", None),
        ("LICENSE", None),
        ("a.py/b", None),
        ("", None),
        ("a.", None),
    ],
)
def test_language_of(path, name):
    language = language_of(path)
    assert (language and language.name) == name
