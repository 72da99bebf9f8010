"""Which checks run on which variants of an architecture, and how each outcome becomes a result.

Decides the plan, how known failures are treated, which variants are skipped, and that any exception of a plugin is a failed
check. Knows nothing of what the checks do or of who shows the results.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch

from lorax_core.attention.select import check_usable
from lorax_core.errors import LoraxError, RequestError, listed, nearest
from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus, explain
from lorax_core.plugins.resolve import load_cases, load_class
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import BASE, Case
from lorax_core.testing.check import Check
from lorax_core.testing.checks import CHECKS
from lorax_core.testing.result import BadlyConditioned, CheckFailed, CheckResult, CheckStatus, NotApplicable
from lorax_core.testing.sizes import with_head_sizes

if TYPE_CHECKING:
    from lorax_core.modeling.config import ModelConfig

Planned = tuple[str | None, Check]
"""A variant (None: the architecture as a whole) and a check that applies to it."""


class Suite:
    """The kit for one architecture on one device with one attention backend.

    `architecture` is the model type of an installed plugin, or a spec that no plugin declares. Checkpoints and models of the
    last two variants are kept, in memory and in `folder`, so run a variant's checks one after the other. `close()`, or
    garbage collection of the suite, removes them; a check that is run later makes them again.
    """

    folder: Path

    def __init__(
        self,
        architecture: str | ArchitectureSpec,
        *,
        host: PluginHost | None = None,
        device: str = "cpu",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.host = (
            _with(architecture, host) if isinstance(architecture, ArchitectureSpec) else host or PluginHost.discover()
        )
        model_type = architecture if isinstance(architecture, str) else architecture.model_type
        self.spec = self.host.architecture(model_type)
        # A spec given by hand has an owner without a module; its classes are then imported from anywhere.
        owner = self.host.owner(model_type)
        own = load_cases(self.spec, owner if owner.module else None)
        self.cases = with_head_sizes(own, self._aliases())
        self._more_sizes = [name for name in self.cases.variants if name not in own.variants][1:]
        self.device = device
        self.backend = backend
        self._dtype = dtype
        _check_device(device)
        check_usable(self.host.backends, backend, device)
        self._cases: dict[str, Case] = {}
        self._remove: weakref.finalize[..., Suite] | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """`base`, which is `tiny_config` itself, sizes of heads that the kit adds, and the `variants` of the cases."""
        return (BASE, *self.cases.variants)

    def plan(self, checks: Collection[str] = (), variants: Collection[str] = ()) -> list[Planned]:
        """What there is to run, variant by variant; names limit it. Raises RequestError for an unknown name.

        Without names, checks that are not `sized` run on the first of the sizes of heads that the kit adds; named, on all.
        """
        _insist(checks, [check.name for check in CHECKS], "check")
        _insist(variants, self.variants, "variant")
        wanted = [check for check in CHECKS if not checks or check.name in checks]
        planned: list[Planned] = [(None, check) for check in wanted if check.once and not variants]
        for variant in self.variants:
            if not variants or variant in variants:
                several = (check for check in wanted if not check.once)
                planned += [
                    (variant, check) for check in several if self._runs(check, variant, bool(checks or variants))
                ]
        return planned

    def run(self, variant: str | None, check: Check) -> CheckResult:
        """The result of one check; any exception but KeyboardInterrupt is a failed check."""
        start = time.perf_counter()
        result = _judged(self._outcome(variant, check), self.cases.known_failures)
        return replace(result, seconds=time.perf_counter() - start)

    def close(self) -> None:
        """Release all checkpoints and models. Idempotent."""
        self._cases.clear()
        if self._remove is not None:
            self._remove()
            self._remove = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs(self, check: Check, variant: str, named: bool) -> bool:
        return check.applies(self.spec) and (check.sized or named or variant not in self._more_sizes)

    def _aliases(self) -> Mapping[str, str]:
        owner = self.host.owner(self.spec.model_type)
        try:
            config = cast("type[ModelConfig]", load_class(self.spec.config, owner if owner.module else None))
            return {**config.aliases, **config.own_keys}
        # The checks of the declaration report a class that is not there, or is no configuration.
        except (LoraxError, AttributeError):
            return {}

    def _outcome(self, variant: str | None, check: Check) -> CheckResult:
        result = CheckResult(check.name, variant, CheckStatus.FAILED)
        try:
            case = self._case(variant or BASE)
            # A refusal is no failure: the architecture may be right where one backend cannot run it.
            if variant is not None and (refusal := case.refusal) is not None:
                return replace(result, status=CheckStatus.SKIPPED, detail=refusal, refused=True)
            measured = check.run(case)
        except NotApplicable as reason:
            return replace(result, status=CheckStatus.SKIPPED, detail=str(reason))
        except BadlyConditioned as reason:
            return replace(result, status=CheckStatus.BADLY_CONDITIONED, detail=str(reason))
        except CheckFailed as failure:
            return replace(result, detail=str(failure))
        # A plugin's code runs in here: whatever it raises is a finding, not the end of the run.
        except Exception as error:
            return replace(result, detail=explain(error))
        status = CheckStatus.PASSED if measured.ok else CheckStatus.FAILED
        return replace(result, status=status, detail=measured.note, error=measured.error, tolerance=measured.tolerance)

    def _case(self, variant: str) -> Case:
        if self._remove is None:
            self.folder = Path(tempfile.mkdtemp(prefix="lorax-conformance-"))
            # Not __del__: this also runs at the end of the interpreter, and holds no reference to the suite.
            self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        if variant not in self._cases:
            while len(self._cases) > 1:
                shutil.rmtree(self._cases.pop(next(iter(self._cases))).folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{variant}-", dir=self.folder))
            self._cases[variant] = Case(
                self.spec,
                self.cases,
                self.host,
                variant,
                folder,
                failure_keys=known_keys(self.cases),
                device=self.device,
                backend=self.backend,
                dtype=self._dtype,
            )
        return self._cases[variant]


def run_checks(
    architecture: str | ArchitectureSpec,
    *,
    host: PluginHost | None = None,
    device: str = "cpu",
    backend: str | None = None,
    checks: Collection[str] = (),
    variants: Collection[str] = (),
    progress: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run the kit on an architecture, all of it unless `checks` or `variants` name less.

    `progress` is called with each result when it is ready. A variant that the named `backend` does not support is skipped.
    Raises PluginError when no plugin provides the architecture, RequestError for an unknown device, backend, check or variant;
    what a check finds is in its result.
    """
    results = []
    with Suite(architecture, host=host, device=device, backend=backend) as suite:
        for variant, check in suite.plan(checks, variants):
            results.append(suite.run(variant, check))
            if progress is not None:
                progress(results[-1])
    return results


def known_keys(cases: ArchitectureCases) -> set[str]:
    """What `known_failures` may name: a check, everywhere or on one variant."""
    once = {check.name for check in CHECKS if check.once}
    names = {check.name for check in CHECKS}
    return names | {f"{name}[{variant}]" for name in names - once for variant in (BASE, *cases.variants)}


def _judged(result: CheckResult, known: Mapping[str, str]) -> CheckResult:
    """A result after `known_failures` was taken into account."""
    # The entry for one variant counts before the one for all.
    name = result.key if result.key in known else result.check
    if name not in known or result.status in (CheckStatus.SKIPPED, CheckStatus.BADLY_CONDITIONED):
        return result
    if result.status is CheckStatus.FAILED:
        return replace(result, status=CheckStatus.KNOWN, detail=f"{known[name]} ({result.detail})")
    # An entry that outlives its failure would hide the next one.
    detail = f"known_failures says it fails ({known[name]}), and it passes: take {name!r} out, or name the variants that fail"
    return replace(result, status=CheckStatus.FAILED, detail=detail)


def _with(spec: ArchitectureSpec, host: PluginHost | None) -> PluginHost:
    """A host with a spec that no plugin declares; it wins over one of that name."""
    host = host or PluginHost.discover()
    # Another plugin of this model type gives way, or the two would be in conflict.
    kept = [
        replace(record, architectures=tuple(one for one in record.architectures if one.model_type != spec.model_type))
        for record in host.records
    ]
    by_hand = PluginRecord("by-hand", "by-hand", "", "", PluginStatus.READY, architectures=(spec,))
    return PluginHost([*kept, by_hand])


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise RequestError(f"{device!r} is not a device: {error}", hint="use 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device!r} was asked for, but torch sees no GPU", hint="use 'cpu'")


def _insist(names: Iterable[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise RequestError(
                f"there is no {what} {name!r}; there are {listed(known, limit=40)}",
                hint=f"did you mean {close!r}?" if close else f"name no {what}, and all are run",
            )
