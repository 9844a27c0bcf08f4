"""The library: loading it, the connection to the TPM, and one ESYS context.

This file loads tpm2-pytss, and only its extension module: the package around it pulls in `cryptography.x509` and the
wrappers of every structure (100 ms against 16 at the start of the daemon, and 8 MB), and its wrappers copy what passes
through them. Here the C structures are ours, to fill, to read and to overwrite.
"""

import importlib.machinery
import importlib.util
import os
import stat
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Self

from unsealerd.errors import ConfigInvalid, NotInstalled, TpmMissing
from unsealerd.tpm.response import TpmResponse

_PACKAGE = "tpm2_pytss"
_EXTENSION = "tpm2_pytss._libtpm2_pytss"

# tss2_esys.h; ESYS_TR constants.
NONE = 0xFFF
PASSWORD = 0x0FF
RH_OWNER = 0x101

_CAP_HANDLES = 1
_TRANSIENT_FIRST = 0x80000000
_LOADED_SESSION_FIRST = 0x02000000
_HANDLES_MAX = 64


def _bindings() -> ModuleType:
    """The extension module of tpm2-pytss. Raises `NotInstalled`.

    It is registered under its own name, so that a later ``import tpm2_pytss`` shares it.
    """
    loaded = sys.modules.get(_EXTENSION)
    if loaded is not None:
        return loaded
    # The library writes to stderr on every refusal, and refusals are our daily bread; what they say comes back to us
    # as codes. It reads the variable when it logs for the first time; who set it keeps the setting.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.submodule_search_locations is None:
        raise NotInstalled("tpm2-pytss is not installed: pip install 'unsealerd[tpm]'")
    spec = importlib.machinery.PathFinder.find_spec(_EXTENSION, list(package.submodule_search_locations))
    if spec is None or spec.loader is None:
        raise NotInstalled("tpm2-pytss has no extension module: install it again")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as err:
        raise NotInstalled(f"the libraries of tpm2-tss cannot be loaded: {err}") from err
    sys.modules[_EXTENSION] = module
    return module


def _path_of(tcti: str) -> tuple[str, str]:
    """Name of the TCTI and path of the device or socket. Raises `ConfigInvalid`."""
    name, _, setting = tcti.partition(":")
    match name:
        case "device" if setting:
            return name, setting
        case "swtpm" if setting.startswith("path="):
            return name, setting.removeprefix("path=")
        case _:
            raise ConfigInvalid(f"not a TPM: {tcti!r}; write device:/dev/tpmrm0 or swtpm:path=/…")


class Connection:
    """The way to one TPM: an open device, or the socket of a software TPM.

    Raises `TpmMissing` if nothing is there, `ConfigInvalid` for a text that names no TPM, `NotInstalled` without the
    library. Never waits for a TPM to appear.
    """

    def __init__(self, tcti: str) -> None:
        name, path = _path_of(tcti)
        try:
            mode = os.stat(path).st_mode
        except OSError as err:
            raise TpmMissing(f"no TPM at {path}: {err.strerror}") from err
        if not (stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)):
            raise TpmMissing(f"{path} is neither a device nor a socket")
        if not os.access(path, os.R_OK | os.W_OK):
            raise TpmMissing(f"no permission to use {path}")
        bindings = _bindings()
        self.ffi: Any = bindings.ffi
        self.lib: Any = bindings.lib
        self.context: Any = self.ffi.new("TSS2_TCTI_CONTEXT **")
        setting = path if name == "device" else f"path={path}"
        code = int(self.lib.Tss2_TctiLdr_Initialize_Ex(name.encode(), os.fsencode(setting), self.context))
        if code != 0:
            raise TpmMissing(f"the TPM at {path} cannot be opened: 0x{code:x}")

    def close(self) -> None:
        if self.context is not None:
            self.lib.Tss2_TctiLdr_Finalize(self.context)
            self.context = None


class Esys:
    """One ESYS context: what the library knows of the TPM while it does one thing for us.

    A context lives for one operation (making one takes microseconds and no command). The library keeps copies in it:
    the last response, decrypted in place, session keys, the sensitive area given to TPM2_Create. They end with the
    context, in memory that is freed; the daemon's allocator overwrites freed memory (glibc.malloc.perturb). A context
    that saw a broken answer is unusable for ever, which ends with it as well. ESYS_TR are the library's handles.
    """

    def __init__(self, connection: Connection) -> None:
        self.ffi = connection.ffi
        self.lib = connection.lib
        self.leaked = False  # something is still loaded, because a flush failed
        self._pointer: Any = self.ffi.new("ESYS_CONTEXT **")
        code = int(self.lib.Esys_Initialize(self._pointer, connection.context[0], self.ffi.NULL))
        if code != 0:
            raise TpmResponse("Initialize", code)

    def close(self) -> None:
        if self._pointer is not None:
            self.lib.Esys_Finalize(self._pointer)
            self._pointer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, command: str, *arguments: Any) -> None:
        """Run ``Esys_COMMAND``. Raises `TpmResponse`. The interpreter runs other threads meanwhile."""
        function: Callable[..., int] = getattr(self.lib, f"Esys_{command}")
        code = int(function(self._pointer[0], *arguments))
        if code != 0:
            raise TpmResponse(command, code)

    def owned(self, pointer: Any) -> Any:
        """A structure that the library allocated, freed with its last reference.

        Its fields do not keep it alive: hold the structure itself for as long as a field is used.
        """
        return self.ffi.gc(pointer[0], self.lib.Esys_Free)

    def sized(self, kind: str, data: bytes | memoryview) -> Any:
        """A new TPM2B structure of that type. Raises ``ValueError`` if `data` is too long for it."""
        structure = self.ffi.new(f"{kind} *")
        if len(data) > len(structure.buffer):
            raise ValueError(f"{len(data)} bytes do not fit into a {kind}")
        self.ffi.memmove(structure.buffer, data, len(data))
        structure.size = len(data)
        return structure

    def public(self, area: bytes) -> Any:
        """TPM2B_PUBLIC from the bytes of a TPMT_PUBLIC. Raises `TpmResponse` (of the library) if it is not one."""
        data = len(area).to_bytes(2, "big") + area
        structure = self.ffi.new("TPM2B_PUBLIC *")
        code = int(
            self.lib.Tss2_MU_TPM2B_PUBLIC_Unmarshal(data, len(data), self.ffi.new("size_t *"), structure)
        )
        if code != 0:
            raise TpmResponse("TPM2B_PUBLIC", code)
        return structure

    def area(self, public: Any) -> bytes:
        """The inverse of `public`."""
        size = self.ffi.sizeof("TPM2B_PUBLIC")
        data, used = self.ffi.new("uint8_t[]", size), self.ffi.new("size_t *")
        code = int(self.lib.Tss2_MU_TPM2B_PUBLIC_Marshal(public, data, size, used))
        if code != 0:
            raise TpmResponse("TPM2B_PUBLIC", code)
        return bytes(self.ffi.buffer(data, used[0])[2:])

    # --- the library's handles

    def from_handle(self, handle: int, session: int = NONE) -> int:
        """An ESYS_TR for an object, index or session that is in the TPM. One command (two with a session)."""
        found = self.ffi.new("ESYS_TR *")
        self.call("TR_FromTPMPublic", handle, session, NONE, NONE, found)
        return int(found[0])

    def name(self, tr: int) -> bytes:
        """The name of a key or an index.

        The library computes it from the public area that it holds and works with; what the TPM, or something on the
        bus, stated beside the public area does not count.
        """
        pointer = self.ffi.new("TPM2B_NAME **")
        self.call("TR_GetName", tr, pointer)
        name = self.owned(pointer)
        return bytes(self.ffi.buffer(name.name, name.size))

    def save(self, tr: int) -> bytes:
        """What the library knows of `tr`, to be given to `restore` of another context. No command."""
        data, size = self.ffi.new("uint8_t **"), self.ffi.new("size_t *")
        self.call("TR_Serialize", tr, data, size)
        owned = self.owned(data)
        return bytes(self.ffi.buffer(owned, size[0]))

    def restore(self, saved: bytes) -> int:
        found = self.ffi.new("ESYS_TR *")
        self.call("TR_Deserialize", saved, len(saved), found)
        return int(found[0])

    def flush(self, tr: int) -> None:
        """TPM2_FlushContext of an object or a session."""
        try:
            self.call("FlushContext", tr)
        except TpmResponse:
            self.leaked = True
            raise

    def handles(self, first: int, count: int = _HANDLES_MAX) -> list[int]:
        """TPM2_GetCapability: the handles of the type of `first` that exist, from `first` on."""
        more, pointer = self.ffi.new("TPMI_YES_NO *"), self.ffi.new("TPMS_CAPABILITY_DATA **")
        self.call("GetCapability", NONE, NONE, NONE, _CAP_HANDLES, first, count, more, pointer)
        answer = self.owned(pointer)
        listed = answer.data.handles
        return [int(listed.handle[i]) for i in range(listed.count)]

    def reclaim(self) -> None:
        """Flush every object and session that is loaded.

        A process that was killed leaves its own in a TPM that has no resource manager (swtpm), which has room for
        three of each. Behind a resource manager one sees only one's own. Nobody else is hurt: without a resource
        manager a TPM has one user at a time.
        """
        for first in (_TRANSIENT_FIRST, _LOADED_SESSION_FIRST):
            for handle in self.handles(first):
                self.flush(self.from_handle(handle))


def saved_public(saved: bytes) -> bytes:
    """The public area (TPMT_PUBLIC) inside what `Esys.save` gave for a key.

    The layout is the library's IESYS_RESOURCE: handle (4), name (2 + n), type of resource (4), TPM2B_PUBLIC.
    """
    name_size = int.from_bytes(saved[4:6], "big")
    public = saved[4 + 2 + name_size + 4 :]
    return public[2 : 2 + int.from_bytes(public[:2], "big")]
