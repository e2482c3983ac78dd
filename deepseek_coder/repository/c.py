"""Include edges of C, C++ and CUDA files.

`#include "x"` is looked for beside the file, then, like `<x>`, under any folder of the repository: which folders the
build passes as include paths is not known, so the nearest file whose path ends in x is taken. The standard headers are
nobody's here in angle brackets, although many repositories hold a `string.h` for some other system; those of POSIX too.
"""

import re
from collections.abc import Mapping

from .graph import Edges
from .paths import Nearest, folder_of, normal, suffixes
from .text import matches

_INCLUDE = re.compile(r'[ \t]*+#[ \t]*+include(?:_next)?[ \t]*+(?:"(?P<own>[^"\n]+)"|<(?P<other>[^>\n]+)>)')

_STANDARD_NAMES = """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic
    stdbit stdbool stdckdint stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype
    aio dirent dlfcn fcntl fnmatch ftw getopt glob grp iconv langinfo libgen libintl malloc memory mqueue netdb nl_types
    poll pthread pwd regex sched semaphore spawn strings syslog termios unistd utime utmpx wordexp
    arpa/inet net/if netinet/in netinet/tcp sys/epoll sys/file sys/inotify sys/ioctl sys/ipc sys/mman sys/mount sys/msg
    sys/param sys/ptrace sys/random sys/resource sys/select sys/sem sys/sendfile sys/shm sys/socket sys/stat sys/statfs
    sys/statvfs sys/syscall sys/sysinfo sys/sysctl sys/time sys/times sys/types sys/uio sys/un sys/utsname sys/vfs
    sys/wait psapi shellapi shlobj tchar tlhelp32 windows winsock winsock2 ws2tcpip
"""
_STANDARD = frozenset(f"{name}.h" for name in _STANDARD_NAMES.split())


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    found = {
        path: [(match["own"], match["other"]) for match in matches(text, "include", _INCLUDE, "\n")]
        for path, text in files.items()
    }
    wanted = {_plain(own or other) for some in found.values() for own, other in some}
    headers = Nearest()
    for path in files:
        for suffix in suffixes(path, wanted):
            headers.add(suffix, path)
    return {path: _dependencies(path, some, files, headers) for path, some in found.items()}


def _dependencies(
    path: str, found: list[tuple[str | None, str | None]], files: Mapping[str, str], headers: Nearest
) -> dict[str, bool]:
    dependencies = {}
    for own, other in found:
        beside = normal(folder_of(path), own) if own else None
        if beside in files:
            dependencies[str(beside)] = True
        elif own or other not in _STANDARD:
            header = headers.find(_plain(own or other or ""), path)
            if header is not None:
                dependencies[header] = True
    return dependencies


def _plain(name: str) -> str:
    """Without the steps upwards: "../include/x.h" may be meant from a folder that the build generates."""
    return "/".join(part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".", ".."))
