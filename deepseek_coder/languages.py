"""The languages of DeepSeek-Coder: the 87 of the paper's table 1, and the two that the README's list adds.

A file's language is decided by its name alone, which is cheap and can be explained. The price: an extension that
several languages share must be given to one of them, once, here. Where that was a choice, the comment behind the line
says why. An extension whose most frequent owner is not among the 89 is given to nobody, because wrong text under a
language's name is worse than none: `.cl` (OpenCL before Common Lisp), `.pp` (Puppet before Pascal), `.pro` (Qt before
Prolog), `.inc` (nearly anything).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """`comment` opens a comment, a blank included where the sign needs one; it ends with the line when `comment_end` is
    empty. No comments at all: both empty."""

    name: str
    extensions: tuple[str, ...]
    filenames: tuple[str, ...] = ()
    comment: str = "#"
    comment_end: str = ""


# fmt: off
LANGUAGES: tuple[Language, ...] = (
    Language("Ada", (".ada", ".adb", ".ads"), (), "--"),
    Language("Agda", (".agda",), (), "--"),
    Language("Alloy", (".als",), (), "//"),
    Language("ANTLR", (".g4", ".g"), (), "//"),
    Language("AppleScript", (".applescript",), (), "--"),
    Language("Assembly", (".asm", ".nasm", ".s"), (), ";"),
    Language("Augeas", (".aug",), (), "(*", "*)"),
    Language("AWK", (".awk", ".gawk", ".mawk", ".nawk")),
    Language("Batchfile", (".bat", ".cmd"), (), "REM "),
    Language("Bluespec", (".bsv",), (), "//"),
    Language("C", (".c", ".h"), (), "//"),  # .h: C++ shares it; what both can include counts as C
    Language("C#", (".cs", ".csx"), (), "//"),
    Language("C++", (".cpp", ".cc", ".cxx", ".c++", ".C", ".hpp", ".hh", ".hxx", ".h++", ".H", ".ipp"), (), "//"),
    Language("Clojure", (".clj", ".cljs", ".cljc", ".cljx"), (), ";"),
    Language("CMake", (".cmake",), ("CMakeLists.txt",)),
    Language("CoffeeScript", (".coffee",), ("Cakefile",)),
    Language("Common Lisp", (".lisp", ".lsp", ".asd"), (), ";"),  # .lsp: NewLisp is far rarer
    Language("CSS", (".css",), (), "/*", "*/"),
    Language("CUDA", (".cu", ".cuh"), (), "//"),
    Language("Dart", (".dart",), (), "//"),
    Language("Dockerfile", (".dockerfile", ".docker"), ("Dockerfile", "Containerfile")),
    Language("Elixir", (".ex", ".exs")),
    Language("Elm", (".elm",), (), "--"),
    Language("Emacs Lisp", (".el",), (".emacs",), ";"),
    Language("Erlang", (".erl", ".hrl", ".escript"), ("rebar.config",), "%"),
    Language("F#", (".fs", ".fsi", ".fsx"), (), "//"),  # .fs: GLSL fragment shaders mostly use .frag
    Language("Fortran", (".f90", ".f95", ".f03", ".f08", ".f", ".for", ".f77"), (), "!"),
    Language("GLSL", (".glsl", ".vert", ".frag", ".geom", ".geo", ".tesc", ".tese", ".comp", ".vsh", ".fsh"), (), "//"),
    Language("Go", (".go",), (), "//"),
    Language("Groovy", (".groovy", ".gradle", ".gvy"), ("Jenkinsfile",), "//"),
    Language("Haskell", (".hs", ".hsc"), (), "--"),
    Language("HTML", (".html", ".htm", ".xhtml"), (), "<!--", "-->"),
    Language("Idris", (".idr", ".lidr"), (), "--"),
    Language("Isabelle", (".thy",), (), "(*", "*)"),
    Language("Java", (".java",), (), "//"),
    Language("Java Server Pages", (".jsp", ".jspf"), (), "<%--", "--%>"),
    Language("JavaScript", (".js", ".mjs", ".cjs", ".jsx", ".jsm"), (), "//"),
    Language("JSON", (".json",), (), ""),
    Language("Julia", (".jl",)),
    Language("Jupyter Notebook", (".ipynb",), (), ""),
    Language("Kotlin", (".kt", ".kts"), (), "//"),
    Language("Lean", (".lean",), (), "--"),
    Language("Literate Agda", (".lagda", ".lagda.md", ".lagda.rst", ".lagda.tex"), (), "--"),
    Language("Literate CoffeeScript", (".litcoffee", ".coffee.md")),
    Language("Literate Haskell", (".lhs",), (), "--"),
    Language("Lua", (".lua",), (), "--"),
    Language("Makefile", (".mk", ".mak"), ("Makefile", "makefile", "GNUmakefile")),
    Language("Maple", (".mpl",)),
    Language("Mathematica", (".nb", ".wl", ".wls", ".nbp", ".ma", ".mathematica"), (), "(*", "*)"),  # no .m: see MATLAB
    Language("MATLAB", (".m", ".matlab"), (), "%"),  # .m: Objective-C is none of the 89, Mathematica is rarer
    Language("OCaml", (".ml", ".mli", ".mll", ".mly"), (), "(*", "*)"),
    Language("Pascal", (".pas", ".dpr", ".lpr"), (), "//"),
    Language("Perl", (".pl", ".pm", ".t", ".perl")),  # .pl, .pm, .t: more files than Prolog's and Raku's together
    Language("PHP", (".php", ".php3", ".php4", ".php5", ".phtml"), (), "//"),
    Language("PowerShell", (".ps1", ".psm1", ".psd1")),
    Language("Prolog", (".prolog", ".plt", ".yap"), (), "%"),  # not .pl: see Perl
    Language("Protocol Buffer", (".proto",), (), "//"),
    Language("Python", (".py", ".pyi", ".pyw"), ("SConstruct", "SConscript", "wscript")),
    Language("R", (".r",), (".Rprofile",)),
    Language("Racket", (".rkt", ".rktd", ".rktl"), (), ";"),
    Language("RMarkdown", (".rmd",), (), "<!--", "-->"),
    Language("Ruby", (".rb", ".rbw", ".rake", ".gemspec", ".ru"), ("Gemfile", "Rakefile", "Vagrantfile", "Podfile")),
    Language("Rust", (".rs",), (), "//"),
    Language("SAS", (".sas",), (), "/*", "*/"),
    Language("Scala", (".scala", ".sbt"), (), "//"),
    Language("Scheme", (".scm", ".ss", ".sld", ".sps"), (), ";"),
    Language("Shell", (".sh", ".bash", ".zsh", ".ksh"), (".bashrc", ".bash_profile", ".zshrc", ".kshrc", "PKGBUILD")),
    Language("Smalltalk", (".st",), (), '"', '"'),
    Language("Solidity", (".sol",), (), "//"),
    Language("SPARQL", (".rq", ".sparql")),
    Language("SQL", (".sql",), (), "--"),
    Language("Stan", (".stan",), (), "//"),
    Language("Standard ML", (".sml", ".sig", ".fun"), (), "(*", "*)"),
    Language("Stata", (".do", ".ado"), (), "//"),
    Language("SystemVerilog", (".sv", ".svh"), (), "//"),
    Language("Tcl", (".tcl",)),
    Language("Tcsh", (".tcsh", ".csh")),
    Language("TeX", (".tex", ".sty", ".cls", ".bib", ".dtx", ".ins", ".ltx"), (), "%"),  # .cls: before Visual Basic's
    Language("Thrift", (".thrift",), (), "//"),
    Language("TypeScript", (".ts", ".tsx", ".mts", ".cts"), (), "//"),  # .ts: Qt's translations are XML
    Language("Verilog", (".v", ".vh", ".veo"), (), "//"),  # .v: Coq and V are none of the 89
    Language("VHDL", (".vhd", ".vhdl"), (), "--"),
    Language("Visual Basic", (".vb", ".bas", ".frm", ".vbs", ".vba"), (), "'"),
    Language("XSLT", (".xsl", ".xslt"), (), "<!--", "-->"),
    Language("Yacc", (".y", ".yacc", ".yy"), (), "//"),
    Language("YAML", (".yaml", ".yml"), (".clang-format",)),
    Language("Zig", (".zig",), (), "//"),
    Language("Markdown", (".md", ".markdown", ".mkd", ".mkdn"), (), "<!--", "-->"),
    Language("reStructuredText", (".rst", ".rest"), (), ".. "),
)
# fmt: on

_BY_FILENAME = {name: language for language in LANGUAGES for name in language.filenames}
_BY_EXTENSION = {extension: language for language in LANGUAGES for extension in language.extensions}


def language_of(path: str) -> Language | None:
    """The language of a file, from its path with forward slashes; None when it is none of the 89.

    The whole file name decides first (`CMakeLists.txt`), then the longest known extension (`.lagda.md` before `.md`).
    An extension is looked up as written, then in lower case: `.C` is C++, while `.R` and `.PY` are R and Python.
    """
    name = path.rsplit("/", 1)[-1]
    if name in _BY_FILENAME:
        return _BY_FILENAME[name]
    dot = name.find(".", 1)  # a leading dot hides a file, it does not begin an extension
    while dot != -1:
        extension = name[dot:]
        language = _BY_EXTENSION.get(extension) or _BY_EXTENSION.get(extension.lower())
        if language is not None:
            return language
        dot = name.find(".", dot + 1)
    return None


def comment_line(path: str, text: str) -> str:
    """`text` as a comment of the path's language, without a line end: "//a/b.c".

    `#` where there is no language, and where a language has no comments (JSON): in a document for a language model
    that is still the plainest sign of one.
    """
    language = language_of(path)
    if language is None or not language.comment:
        return "#" + text
    return language.comment + text + language.comment_end
