"""Register this package with Anomalib as soon as Anomalib is imported, and not before.

Anomalib has no entry points for plug-ins: a model becomes `--model ExDD` once its class has been imported. The files
`anomalib_exdd.pth` (and, from Python 3.15 on, `anomalib_exdd.start`) call `install` whenever Python starts. It imports
nothing but `sys`; it leaves one finder on `sys.meta_path` that waits for the modules of `MODULES`, lets the
finders behind it locate the real module, and runs our registration right after the module's own body. Once all of them
are registered the finder removes itself.

A failure costs one line on standard error, never Anomalib or Python. `ANOMALIB_EXDD_AUTOLOAD=0` turns it off.
"""

import sys

TYPE_CHECKING = False  # as in `typing`, which is too slow to import in every Python process
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPT_OUT_VARIABLE = "ANOMALIB_EXDD_AUTOLOAD"

MODULES = ("anomalib.cli.pipelines", "anomalib.data", "anomalib.models")
"""Modules of Anomalib that this package registers with."""


def install() -> None:
    """Wait for Anomalib's import; does nothing when already waiting or when the environment opts out."""
    import os  # noqa: PLC0415  # loaded by `site` already; not needed by whoever only imports this module

    if os.environ.get(OPT_OUT_VARIABLE, "1").strip().lower() in {"0", "false", "no", "off"}:
        return
    if not any(isinstance(finder, RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterAfterImport())


class RegisterAfterImport:
    """A meta-path finder that finds nothing itself: it adds our registration to what the other finders found."""

    def __init__(self) -> None:
        self._waiting = set(MODULES)

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the real spec of one of Anomalib's modules with our registration attached, else None."""
        if fullname not in self._waiting:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            try:
                self._attach(spec.loader, fullname)
            except Exception as error:  # noqa: BLE001  # a loader we cannot wrap is no reason to lose Anomalib
                warn_not_registered(fullname, error)
        return spec

    def _attach(self, loader: "Loader", fullname: str) -> None:
        run_body = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            run_body(module)
            self._register(fullname)

        # On the instance: other modules' loaders of the same class stay as they are.
        loader.exec_module = exec_module  # type: ignore[method-assign]

    def _register(self, fullname: str) -> None:
        # Only now: had the module's body failed, the next attempt to import it would still find us waiting.
        self._waiting.discard(fullname)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            from anomalib_exdd import plugin  # noqa: PLC0415  # not before Anomalib is imported

            if fullname in plugin.CLASSES:
                plugin.register_classes(fullname)
            else:
                plugin.register_subcommands()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with this package, Anomalib has to work
            warn_not_registered(fullname, error)


def warn_not_registered(fullname: str, error: Exception) -> None:
    """Say in one line of standard error that, and why, the package is missing from Anomalib's `fullname`."""
    if sys.stderr is None:  # a process without a console
        return
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    sys.stderr.write(
        f"anomalib-exdd: not registered with {fullname} ({reason}). Anomalib works without it; "
        f"{OPT_OUT_VARIABLE}=0 stops the attempt.\n"
    )
