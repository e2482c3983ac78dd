"""Import edges of the languages beside Python: each form of import once, and texts made to take long."""

import json
import time

import pytest

from deepseek_coder.repository import imports, related

# name -> (files, {path: {dependency: strong}}); files that are not named have none.
CASES = {
    "C: beside the file, then anywhere": (
        {
            "src/a.c": '#include "a.h"\n #  include <lib/b.h>\n#include <string.h>\n#include <b.h> // x\n',
            "src/a.h": "",
            "include/lib/b.h": '#include "../up.h"',
            "include/up.h": "",
            "compat/string.h": "",
        },
        {"src/a.c": {"src/a.h": True, "include/lib/b.h": True}, "include/lib/b.h": {"include/up.h": True}},
    ),
    "C: what POSIX and Windows have in angle brackets": (
        {
            "a.c": "#include <regex.h>\n#include <sys/epoll.h>\n#include <x/y.h>",
            "r/regex.h": "",
            "sys/epoll.h": "",
            "x/y.h": "",
        },
        {"a.c": {"x/y.h": True}},
    ),
    "C: the nearest of several": (
        {"x/src/a.c": '#include "config.h"', "x/inc/config.h": "", "y/config.h": "", "config.h": ""},
        {"x/src/a.c": {"x/inc/config.h": True}},
    ),
    "C: a path that a build makes": (
        {"a.cpp": '#include "../gen/api/x.hpp"\n#include "none.hpp"', "src/gen/api/x.hpp": ""},
        {"a.cpp": {"src/gen/api/x.hpp": True}},
    ),
    "C and CUDA": (
        {"k.cu": '#include "k.cuh"', "k.cuh": '#include "v.h"', "v.h": ""},
        {"k.cu": {"k.cuh": True}, "k.cuh": {"v.h": True}},
    ),
    "Java": (
        {
            "src/a/A.java": "package a;\nimport b.B;\nimport static b.C.make;\nimport c.*;\nimport java.util.List;\n"
            "class A extends Near { D d; Other o; x.Far f; }",
            "src/a/Near.java": "package a;\nclass Near {}",
            "src/a/Far.java": "package a;\nclass Far {}",
            "wrong/folder/B.java": "package b;\npublic class B {}",
            "src/b/C.java": "package b;\npublic class C {}",
            "src/c/D.java": "package c;\npublic class D {}",
            "src/c/E.java": "package c;\npublic class E {}",
        },
        {
            "src/a/A.java": {
                "wrong/folder/B.java": True,
                "src/b/C.java": True,
                "src/c/D.java": False,
                "src/a/Near.java": False,
            }
        },
    ),
    "Java: the nearest of two modules": (
        {
            "one/A.java": "package p;\nimport q.B;",
            "one/B.java": "package q;\nclass B {}",
            "two/B.java": "package q;\nclass B {}",
        },
        {"one/A.java": {"one/B.java": True}},
    ),
    "Kotlin and Java": (
        {
            "A.kt": "package a\nimport b.Shape\nimport b.area as size\nimport j.J\n"
            "import e.grow\nimport e.Kind\nfun main() = Near()",
            "types.kt": "package a\ninternal class Near\nclass Unused2",
            "shapes.kt": "package b\nsealed interface Shape\nfun Shape.area() = 1",
            "extensions.kt": "package e\ninternal fun <T> List<T>.grow() = 1\nenum class Kind",
            "J.java": "package j;\nimport a.Near;\nclass J {}",
        },
        {
            "A.kt": {"shapes.kt": True, "J.java": True, "extensions.kt": True, "types.kt": False},
            "J.java": {"types.kt": True},
        },
    ),
    "Kotlin: extensions of generic types do not declare these": (
        {
            "maps.kt": "package a\nfun Map<String, Int>.total() = 1\nval <K, V> Map<K, V>?.size2: Int get() = 0",
            "B.kt": "package a\nclass B(val map: Map<String, Int>)",
            "C.kt": "package b\nimport a.total\nimport a.size2",
            "D.java": 'package a;\n@Deprecated(since = "1") class Hidden {}',
            "E.java": "package b;\nimport a.Hidden;\nimport static a.MapsKt.total;\nclass E {}",
        },
        {"C.kt": {"maps.kt": True}, "E.java": {"D.java": True, "maps.kt": True}},
    ),
    "Scala: private to a package": (
        {
            "A.scala": "package a\nprivate[a] class Hidden\nprotected[this] object Other",
            "B.scala": "package b\nimport a.{Hidden, Other}",
        },
        {"B.scala": {"A.scala": True}},
    ),
    "Scala": (
        {
            "A.scala": "package com.x\npackage y\nimport z.{B, C => D, _}\nimport com.w.util.run\nobject A { new E }",
            "B.scala": "package com.x.y.z\ncase class B()\n",
            "C.scala": "package com.x.y.z\ntrait C",
            "u.scala": "package com.w\nobject util { def run = 1 }",
        },
        {"A.scala": {"B.scala": True, "C.scala": True, "u.scala": True}},
    ),
    "C#": (
        {
            "A.cs": "using N.M;\nusing X = N.K.Thing;\nnamespace App.Sub;\n"
            "[Marked] class A : Base { B b; Top t; c.E e; }",
            "B.cs": "namespace N.M\n{\n  public sealed class B {}\n}",
            "E.cs": "namespace N.M\n{\n  public class E {}\n}",
            "K.cs": "namespace N.K { }\nnamespace N.K\n{\n    public readonly record struct Thing(int I);\n}",
            "Base.cs": "namespace App.Sub;\npublic abstract partial class Base {}",
            "Base.More.cs": "namespace App.Sub;\npublic abstract partial class Base {}",
            "Top.cs": "namespace App;\npublic interface Top {}",
            "MarkedAttribute.cs": "namespace App;\nclass MarkedAttribute {}",
        },
        {
            "A.cs": {"B.cs": True, "K.cs": True, "Base.cs": False, "Top.cs": False, "MarkedAttribute.cs": False},
            "Base.More.cs": {"Base.cs": False},
        },
    ),
    "C#: a namespace in a namespace": (
        {
            "A.cs": "namespace N\n{\n    namespace M\n    {\n        class In {}\n    }\n    namespace K\n    {\n"
            "        delegate Dictionary<string, int> Make(int x);\n    }\n}\nnamespace Z\n{\n    class Last {}\n}",
            "B.cs": "using N.M;\nclass B { In i; }",
            "C.cs": "using N.K;\nclass C { Make m; }",
            "D.cs": "using Z;\nclass D { Last l; }",
            "E.cs": "using M;\nusing K.Z;\nclass E { In i; Last l; }",
        },
        {"B.cs": {"A.cs": True}, "C.cs": {"A.cs": True}, "D.cs": {"A.cs": True}},
    ),
    "C#: global using": (
        {
            "p/p.csproj": "",
            "p/Usings.cs": "global using N;",
            "p/A.cs": "class A { T t; }",
            "q/q.csproj": "",
            "q/B.cs": "class B { T t; }",
            "q/T.cs": "namespace N;\nclass T {}",
        },
        {"p/A.cs": {"q/T.cs": True}},
    ),
    "TypeScript": (
        {
            "src/a.ts": "/** Example:\n * import {e} from './example'\n */\n// require('./example')\n"
            "import x from './b'\nimport {\n  y,\n} from './c.js';\nexport * from \"./dir\"\n"
            "import type { T } from './t'\n"
            "import './side'\nconst z = require('../z')\nasync () => {\n  await import('./late')\n}\n"
            "export type { U } from './u'\n"
            "import data from './data.json'\nimport type from './d'\nimport react from 'react'\n",
            "src/b.tsx": "",
            "src/example.ts": "",
            "src/c.ts": "",
            "src/c.d.ts": "",
            "src/dir/index.ts": "",
            "src/t.d.ts": "",
            "src/side.js": "",
            "z.js": "",
            "src/late.ts": "",
            "src/u.ts": "",
            "src/data.json": "{}",
            "src/d.ts": "",
        },
        {
            "src/a.ts": {
                "src/b.tsx": True,
                "src/c.ts": True,
                "src/dir/index.ts": True,
                "src/t.d.ts": False,
                "src/side.js": True,
                "z.js": True,
                "src/late.ts": False,
                "src/u.ts": False,
                "src/d.ts": True,
            }
        },
    ),
    "TypeScript: path aliases": (
        {
            "tsconfig.json": '{ // "paths" below\n'
            ' "compilerOptions": {"baseUrl": "./src", "paths": {"@lib/*": ["lib/*"], "~": ["x.ts"],}} }',
            "src/a.ts": "import '@lib/b'\nimport '~'\nimport 'plain/c'\n",
            "src/lib/b.ts": "",
            "src/x.ts": "",
            "src/plain/c.ts": "",
            "sub/tsconfig.json": '{"extends": "../tsconfig.base", "compilerOptions": {}}',
            "tsconfig.base.json": '{"compilerOptions": {"paths": {"#/*": ["./sub/deep/*"]}}}',
            "sub/d.ts": "import '#/e'\nimport '@lib/b'",
            "sub/deep/e.ts": "",
        },
        {
            "src/a.ts": {"src/lib/b.ts": True, "src/x.ts": True, "src/plain/c.ts": True},
            "sub/d.ts": {"sub/deep/e.ts": True},
        },
    ),
    "TypeScript: @ without a configuration": (
        {"web/src/a.ts": "import '@/b'", "web/src/b.ts": ""},
        {"web/src/a.ts": {"web/src/b.ts": True}},
    ),
    "JavaScript: workspaces": (
        {
            "packages/core/package.json": '{"name": "@my/core", "main": "dist/index.js"}',
            "packages/core/src/index.ts": "",
            "packages/core/src/deep.ts": "",
            "packages/app/main.js": "import '@my/core'\nimport '@my/core/deep'\nconst c = require('@my/none')",
            "packages/app/sub/package.json": '{"main": "./entry.js"}',
            "packages/app/sub/entry.js": "",
            "packages/app/b.js": "import './sub'",
        },
        {
            "packages/app/main.js": {"packages/core/src/index.ts": True, "packages/core/src/deep.ts": True},
            "packages/app/b.js": {"packages/app/sub/entry.js": True},
        },
    ),
    "Go": (
        {
            "go.mod": "module example.org/m/v2\n\ngo 1.21\n",
            "main.go": 'package main\n\nimport (\n\t"fmt"\n\tut "example.org/m/v2/util"\n'
            '\t_ "example.org/m/v2/plug"\n)\n\n'
            "func main() { fmt.Println(ut.Hello, ut.Size); run() }\n",
            "run.go": "package main\n\nfunc run() {}\nfunc other() {}\n",
            "util/hello.go": "package util\n\nfunc Hello() {}\n",
            "util/size.go": "package util\n\nconst (\n\tSize = 1\n)\n",
            "util/unused.go": "package util\n\nvar Unused int\n",
            "util/hello_test.go": "package util\n\nfunc Size2() { Hello() }\n",
            "plug/plug.go": "package plug\n",
        },
        {
            "main.go": {"util/hello.go": True, "util/size.go": True, "plug/plug.go": False, "run.go": False},
            "util/hello_test.go": {"util/hello.go": False},
        },
    ),
    "Go: modules in a monorepo, one of them vendored": (
        {
            "a/go.mod": "module x.org/a",
            "b/go.mod": "module x.org/b\nreplace x.org/a => ../a",
            "a/p/p.go": "package p\nfunc P() {}",
            "b/b.go": 'package b\nimport "x.org/a/p"\nimport "y.org/v"\nvar _ = p.P(v.V)',
            "b/vendor/y.org/v/v.go": "package v\nvar V = 1",
        },
        {"b/b.go": {"a/p/p.go": True, "b/vendor/y.org/v/v.go": True}},
    ),
    "Go: without a go.mod": (
        {
            "b.go": 'package b\nimport "x.org/me/a/p"\nvar _ = p.P()',
            "p/p.go": "package p\n",
            "a/p/p.go": "package p\nfunc P() {}",
        }
        | {"c.go": 'package b\nimport "x.org/me/a/p"\nimport "x.org/me/p"'},
        {"b.go": {"a/p/p.go": True}, "c.go": {"a/p/p.go": False, "p/p.go": False}},
    ),
    "Rust": (
        {
            "Cargo.toml": '[package]\nname = "my-app"\n',
            "src/lib.rs": 'pub mod a;\nmod b;\n#[path = "odd.rs"]\nmod c;\npub use a::Thing;\n',
            "src/a.rs": "use crate::b::{self, inner::{X as Y, Z}};\nuse super::Root;\nuse std::fmt;\n"
            "mod tests {\n    use super::*;\n}\n",
            "src/b/mod.rs": "pub mod inner;\nuse self::inner::X;\n",
            "src/b/inner.rs": "use super::super::a;\nfn f() { crate::a::g() }\n",
            "src/odd.rs": "",
            "tests/t.rs": "use my_app::a::Thing;\n",
        },
        {
            "src/lib.rs": {"src/a.rs": True, "src/b/mod.rs": True, "src/odd.rs": True},
            "src/a.rs": {"src/b/mod.rs": True, "src/b/inner.rs": True, "src/lib.rs": False},
            "src/b/mod.rs": {"src/b/inner.rs": True},
            "src/b/inner.rs": {"src/a.rs": True},
            "tests/t.rs": {"src/a.rs": True},
        },
    ),
    "Rust: a workspace": (
        {
            "core/Cargo.toml": '[package]\nname = "my-core"\n[lib]\nname = "heart"\n',
            "core/src/lib.rs": "pub mod x;",
            "core/src/x.rs": "",
            "util-x/src/lib.rs": "",
            "app/src/main.rs": "extern crate util_x;\nuse heart::x::T;\nuse my_core::U;\n",
        },
        {
            "core/src/lib.rs": {"core/src/x.rs": True},
            "app/src/main.rs": {"core/src/x.rs": True, "core/src/lib.rs": False, "util-x/src/lib.rs": False},
        },
    ),
    "PHP": (
        {
            "composer.json": json.dumps({"autoload": {"psr-4": {"My\\Lib\\": "lib/", "Old\\": ["x", "old"]}}}),
            "src/A.php": "<?php\nnamespace App;\nuse App\\Model\\B;\nuse App\\Model\\{C, D as E};\n"
            "use My\\Lib\\Deep\\F;\n"
            "require_once __DIR__ . '/../inc/g.php';\nclass A extends Near { function f() { new \\App\\Model\\H(); } }",
            "src/Near.php": "<?php namespace App;\nabstract class Near {}",
            "src/B.php": "<?php\nnamespace App\\Model;\nclass B {}",
            "src/C.php": "<?php\nnamespace App\\Model;\ninterface C {}",
            "src/D.php": "<?php\nnamespace App\\Model;\ntrait D {}",
            "src/H.php": "<?php\nnamespace App\\Model;\nfinal class H {}",
            "lib/Deep/F.php": "",
            "inc/g.php": "<?php\ninclude('h.php');\ninclude dirname(__FILE__) . '/i.php';",
            "inc/h.php": "",
            "inc/i.php": "",
        },
        {
            "src/A.php": {
                "src/B.php": True,
                "src/C.php": True,
                "src/D.php": True,
                "lib/Deep/F.php": True,
                "inc/g.php": True,
                "src/H.php": False,
                "src/Near.php": False,
            },
            "inc/g.php": {"inc/h.php": True, "inc/i.php": True},
        },
    ),
    "Ruby": (
        {
            "lib/gem.rb": "require 'json'\nrequire 'gem/a'\nrequire_relative \"gem/b\"\nautoload :C, 'gem/c'\n",
            "lib/gem/a.rb": "",
            "lib/gem/b.rb": "require_relative '../none'",
            "lib/gem/c.rb": "",
            "test/test_a.rb": "require File.expand_path('helper', __dir__)\nrequire 'gem/a'\n",
            "test/gem/a.rb": "",
            "test/helper.rb": "load 'gem/c.rb'",
        },
        {
            "lib/gem.rb": {"lib/gem/a.rb": True, "lib/gem/b.rb": True, "lib/gem/c.rb": False},
            "test/test_a.rb": {"test/helper.rb": True, "lib/gem/a.rb": True},
            "test/helper.rb": {"lib/gem/c.rb": True},
        },
    ),
    "Python: weak edges": (
        {
            "p/__init__.py": "",
            "p/a.py": "from typing import TYPE_CHECKING\nimport p.b\nfrom p import name\n"
            "if TYPE_CHECKING:\n    from p import c\n"
            "try:\n    from p import d\nexcept ImportError:\n    pass\n\ndef f():\n    from p import e, b\n",
            "p/b.py": "",
            "p/c.py": "",
            "p/d.py": "",
            "p/e.py": "",
        },
        {"p/a.py": {"p/b.py": True, "p/__init__.py": False, "p/c.py": False, "p/d.py": True, "p/e.py": False}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms(name):
    files, expected = CASES[name]
    found = imports(files)
    assert found.keys() == files.keys()
    assert {path: edges for path, edges in found.items() if edges} == expected


EXTENSIONS = ["c", "java", "kt", "scala", "cs", "ts", "go", "rs", "php", "rb", "py"]
LINES = {
    "one long line": "x" * 8_000_000,
    "spaces": " " * 2_000_000 + "\n" + "\t" * 2_000_000,
    "words in one line": "import from use require include using package namespace mod " * 40_000,
    "words in many lines": "import a.\nfrom \nuse a::{\nrequire(\n#include <\nusing a\npackage \nnamespace \nmod a\n"
    * 40_000,
    "open brackets": "import a.{" * 100_000 + "use a::{" * 100_000 + "import (" * 100_000 + "from a import (" * 50_000,
    "nested braces": "use " + "a::{" * 5_000 + "}" * 5_000 + ";\nimport a.{" + "b," * 200_000 + "}",
    "quotes": 'from "' * 200_000 + "import '" * 200_000 + 'require("' * 100_000,
    "modifiers": "public static final " * 100_000 + "\n" + "\npublic static final @A " * 50_000,
    "namespaces": "".join(f"using A{i};\nnamespace N{i};\nclass C{i} {{}}\n" for i in range(30_000)),
    "dots": "import " + "a." * 500_000 + "\nfrom " + "." * 500_000 + " import x\nuse " + "super::" * 100_000 + "x;",
}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_no_text_takes_long(extension):
    """Each text is megabytes long: anything quadratic would take hours."""
    for name, text in LINES.items():
        began = time.process_time()
        imports({f"a.{extension}": text, f"b.{extension}": text[:1000]})
        assert time.process_time() - began < 8, name


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_many_files_of_one_name_take_little_time(extension):
    """Every file imports the one beside it, and there are thousands of that name."""
    text = {
        "c": '#include "util.h"', "java": "package p;\nimport p.util;", "kt": "package p\nimport p.util",
        "scala": "package p\nimport p.util", "cs": "using N;\nclass C { util u; }", "ts": "import 'util'",
        "go": 'package a\nimport "x.org/util"', "rs": "use crate::util;", "php": "<?php\nrequire 'util.php';",
        "rb": "require 'util'", "py": "import util",
    }[extension]  # fmt: skip
    name = {"c": "util.h", "cs": "util.cs"}.get(extension, f"util.{extension}")
    body = {"cs": "namespace N;\nclass util {}", "java": "package p;\nclass util {}"}.get(extension, "")
    files = {}
    for number in range(5_000):
        files[f"f{number % 70}/{number}/{name}"] = body
        files[f"f{number % 70}/{number}/a.{extension}"] = text
    began = time.process_time()
    found = imports(files)
    assert time.process_time() - began < 8
    if extension not in ("ts", "go", "rs", "kt", "scala"):
        assert all(found[f"f{n % 70}/{n}/a.{extension}"].keys() == {f"f{n % 70}/{n}/{name}"} for n in range(5_000))


def test_languages_that_share_files():
    assert related("a/b.cpp") == related("x.h") == {"C", "C++", "CUDA"}
    assert related("a.py") == {"Python"}
    assert related("a.sql") == {"SQL"}
    assert related("a.unknown") == frozenset()
