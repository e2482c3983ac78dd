"""Edges of real repositories, checked by reading the files that are named here.

The orders of the same repositories: as many edges satisfied as the paper's algorithm satisfies, and more where there
are cycles.
"""

import pytest

from deepseek_coder.languages import language_of
from deepseek_coder.repository import imports, order

pytestmark = pytest.mark.network

MANIFESTS = ("Cargo.toml", "go.mod", "pyproject.toml", "setup.py")

RUST = "src/rust/cryptography-x509"
JPYPE = "native/jpype_module/src/main/java/org/jpype"
SCREENS = "android/src/main/java/com/swmansion/rnscreens"

# package -> file -> all that it depends on -> whether strongly.
EDGES = {
    "psutil==7.2.2": {
        "psutil/_psbsd.py": {
            "psutil/__init__.py": False,
            "psutil/_common.py": True,
            "psutil/_ntuples.py": True,
            "psutil/_psposix.py": True,
        },
        "psutil/arch/linux/disk.c": {"psutil/arch/all/init.h": True},
        "psutil/arch/all/init.h": {
            f"psutil/arch/{name}/init.h": True
            for name in ("bsd", "freebsd", "linux", "netbsd", "openbsd", "osx", "posix", "sunos", "windows")
        },
        "scripts/battery.py": {"psutil/__init__.py": False},
    },
    "hiredis==3.5.0": {
        "src/hiredis.c": {"src/hiredis.h": True, "src/reader.h": True, "src/pack.h": True},
        "vendor/hiredis/alloc.c": {"vendor/hiredis/fmacros.h": True, "vendor/hiredis/alloc.h": True},
        "vendor/hiredis/hiredis.c": {
            f"vendor/hiredis/{name}.h": True for name in ("fmacros", "hiredis", "net", "sds", "async", "win32")
        },
        "hiredis/__init__.py": {"hiredis/hiredis.pyi": True, "hiredis/version.py": True},
    },
    "cffi==2.1.1": {
        "src/c/libffi_x86_x64/win32.c": {
            "src/c/libffi_x86_x64/ffi.h": True,
            "src/c/libffi_x86_x64/ffi_common.h": True,
        },
        "src/cffi/_embedding.h": {"src/cffi/_cffi_errors.h": True},
        "src/cffi/pkgconfig.py": {"src/cffi/error.py": True},
    },
    "cryptography==42.0.8": {
        f"{RUST}/src/csr.rs": {f"{RUST}/src/{name}.rs": True for name in ("common", "extensions", "name", "oid")},
        f"{RUST}/src/common.rs": {f"{RUST}/src/oid.rs": True},
        f"{RUST}-verification/src/trust_store.rs": {
            f"{RUST}-verification/src/certificate.rs": True,
            f"{RUST}-verification/src/ops.rs": True,
            f"{RUST}-verification/src/lib.rs": False,
            f"{RUST}/src/name.rs": True,
        },
        "src/rust/src/backend/ed25519.rs": {
            "src/rust/src/backend/utils.rs": True,
            "src/rust/src/buf.rs": True,
            "src/rust/src/error.rs": True,
            "src/rust/src/exceptions.rs": True,
        },
        "src/cryptography/x509/name.py": {
            "src/cryptography/utils.py": True,
            "src/cryptography/hazmat/bindings/_rust/x509.pyi": True,
            "src/cryptography/x509/oid.py": True,
        },
    },
    "sentencepiece==0.2.3": {
        "sentencepiece/lite/cached_sentencepiece_lite.cc": {
            "sentencepiece/lite/cached_sentencepiece_lite.h": True,
            "sentencepiece/lite/sentencepiece_lite.h": True,
            "sentencepiece/third_party/rapidhash/rapidhash.h": True,
        },
        "sentencepiece/src/char_model.cc": {"sentencepiece/src/char_model.h": True},
    },
    "tree-sitter-python==0.25.0": {"src/tree_sitter/array.h": {"src/tree_sitter/alloc.h": True}},
    "requests==2.34.2": {
        "src/requests/auth.py": {
            "src/requests/_internal_utils.py": True,
            "src/requests/compat.py": True,
            "src/requests/cookies.py": True,
            "src/requests/utils.py": True,
            "src/requests/models.py": False,
        },
        "tests/test_lowlevel.py": {
            "src/requests/__init__.py": False,
            "src/requests/compat.py": True,
            "tests/testserver/server.py": True,
            "tests/utils.py": True,
        },
    },
    "jpype1==1.7.1": {
        "native/common/jp_array.cpp": {
            "native/common/include/jpype.h": True,
            "native/python/include/pyjp.h": True,
            "native/common/include/jp_array.h": True,
            "native/common/include/jp_arrayclass.h": True,
            "native/common/include/jp_primitive_accessor.h": True,
        },
        "test/harness/jpype/mro/A.java": {
            "test/harness/jpype/mro/E.java": False,
            "test/harness/jpype/mro/F.java": False,
        },
        f"{JPYPE}/manager/TypeFactoryNative.java": {f"{JPYPE}/manager/TypeFactory.java": False},
        "jpype/_jarray.py": {"jpype/_jcustomizer.py": True},
    },
    "pythonnet==3.2.1": {
        "src/runtime/StateSerialization/MetatypeState.cs": {"src/runtime/PythonTypes/PyType.cs": False},
        "src/runtime/PythonTypes/PyList.cs": {
            "src/runtime/Native/BorrowedReference.cs": False,
            "src/runtime/Native/NewReference.cs": False,
            "src/runtime/Native/StolenReference.cs": False,
            "src/runtime/PythonException.cs": False,
            "src/runtime/PythonTypes/PyObject.cs": False,
            "src/runtime/PythonTypes/PySequence.cs": False,
            "src/runtime/Runtime.cs": False,
            "src/runtime/Util/Util.cs": False,
        },
    },
    "npm:rxjs@7.8.2": {
        "src/internal/operators/map.ts": {
            "src/internal/types.ts": True,
            "src/internal/util/lift.ts": True,
            "src/internal/operators/OperatorSubscriber.ts": True,
        },
        "src/internal/operators/share.ts": {
            "src/internal/observable/innerFrom.ts": True,
            "src/internal/Subject.ts": True,
            "src/internal/Subscriber.ts": True,
            "src/internal/Subscription.ts": True,
            "src/internal/types.ts": True,
            "src/internal/util/lift.ts": True,
        },
    },
    "npm:@reduxjs/toolkit@2.14.0": {
        "src/entities/models.ts": {
            "src/draftTypes.ts": False,
            "src/createAction.ts": False,
            "src/tsHelpers.ts": False,
            "src/uncheckedindexed.ts": False,
            "src/entities/state_selectors.ts": False,
        },
        "src/query/core/buildMiddleware/windowEventHandling.ts": {
            "src/query/core/apiState.ts": True,
            "src/query/core/setupListeners.ts": True,
            "src/query/core/buildMiddleware/types.ts": False,
        },
    },
    "npm:react-native-screens@4.30.1": {
        f"{SCREENS}/gamma/stack/header/toolbar/StackHeaderToolbarMenuElementConfig.kt": {
            f"{SCREENS}/gamma/stack/header/toolbar/StackHeaderToolbarMenuConfig.kt": False,
            f"{SCREENS}/gamma/stack/header/toolbar/StackHeaderToolbarMenuItemConfig.kt": False,
        },
        f"{SCREENS}/ScreenStack.kt": {
            f"{SCREENS}/Screen.kt": True,
            f"{SCREENS}/ScreenContainer.kt": False,
            f"{SCREENS}/ScreenFragmentWrapper.kt": False,
            f"{SCREENS}/ScreenStackFragment.kt": False,
            f"{SCREENS}/ScreenStackFragmentWrapper.kt": False,
            f"{SCREENS}/bottomsheet/SheetUtils.kt": True,
            f"{SCREENS}/events/StackFinishTransitioningEvent.kt": True,
            f"{SCREENS}/stack/views/ChildDrawingOrderStrategyImpl.kt": True,
            f"{SCREENS}/stack/views/ChildrenDrawingOrderStrategy.kt": True,
            f"{SCREENS}/stack/views/ScreensCoordinatorLayout.kt": True,
            f"{SCREENS}/utils/FragmentTransactionKt.kt": True,
        },
        "src/components/DebugContainer.tsx": {"src/components/ScreenContentWrapper.tsx": True, "src/types.tsx": True},
        "common/cpp/react/renderer/components/rnscreens/RNSScreenState.cpp": {
            "common/cpp/react/renderer/components/rnscreens/RNSScreenState.h": True
        },
    },
}


@pytest.mark.parametrize("package", EDGES)
def test_edges_that_were_read(package, source):
    files = {
        path: content.decode("utf-8", "replace")
        for path, content in source(package).items()
        if len(content) <= 1 << 20 and (language_of(path) or path.rpartition("/")[2] in MANIFESTS)
    }
    edges = imports(files)
    for path, expected in EDGES[package].items():
        assert edges[path] == expected, path
    total = sum(map(len, edges.values()))
    first = {}
    for method in ("feedback", "paper"):
        place = {path: n for component in order(files, edges, method) for n, path in enumerate(component)}
        first[method] = sum(place[other] < place[path] for path in files for other in edges[path])
    assert total >= first["feedback"] >= first["paper"] > 0
