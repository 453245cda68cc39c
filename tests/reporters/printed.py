"""Every table of the project, printed with figures as large as they get."""

import dataclasses

import msgspec

from bench import report as bench_report
from bench import results
from bench.experiment import __main__ as experiment
from bench.experiment import cases
from bench.programs import measure
from bench.programs import report as programs_report
from bench.scanner import guests, outcome, pair_report, recording, scanners, work
from bench.scanner import report as scanner_report
from kernel import __main__ as kernel
from kernel.checks import Verdict
from sksm import estimate, gain, others, outcomes, report
from sksm.commands import diagnosis, doctor, outlook, sharing
from sksm.commands.demonstration import figures as snapshots
from sksm.commands.demonstration import ksmd, proofs, run
from sksm.daemon import protocol
from sksm.reporters import demo, merge, stat, tables, watch
from sksm.reporters import diagnosis as diagnosis_report
from sksm.reporters import doctor as doctor_report
from sksm.reporters import estimate as estimate_report
from sksm.scanner import figures

BYTES = 10**18  # 909,494.7 TiB
COUNT, PID = 10**9, 4_194_304


def _large(name, kind):
    if kind == "int":
        return PID if "pid" in name else BYTES if "_bytes" in name else COUNT
    return {"float": 123_456.789, "str": "a [red]word", "bool": True}.get(kind)


def full(kind, **given):
    """Make a record whose numbers are as large as they get."""
    if issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
    else:
        fields = dataclasses.fields(kind)
    values = {}
    for field in fields:
        name = getattr(field.type, "__name__", str(field.type))
        value = _large(field.name, name.removesuffix(" | None"))
        if value is not None:
            values[field.name] = value
    return kind(**{**values, **given})


def _estimate():
    found = full(estimate.Figures)
    heat = outlook.Heat(BYTES, found)
    one = full(outlook.Finding, figures=found, heat=heat, notes=["left alone"])
    estimate_report.show(
        full(
            outlook.Outlook,
            total=found,
            heat=heat,
            gains=[full(gain.Gain)],
            processes=[one, one],
            failures=[],
        )
    )


def _outcomes():
    worth = full(estimate.Worth)
    merged = full(report.MergeReport, merged=BYTES // 4096, reasons={})
    one = full(
        outcomes.Outcome,
        pss_before=BYTES,
        pss_after=BYTES,
        worth=worth,
        report=merged,
        refusal="",
        error=None,
    )
    return [one, dataclasses.replace(one, name="another")]


def _stat():
    sharer = full(sharing.Sharer)
    pool = full(sharing.PoolUse, sharers=[sharer, sharer])
    ksm = [full(sharing.KsmSharer)]
    found = full(sharing.Survey, pools=[pool], ksm_sharers=ksm, vma_bytes=256)
    stat.show(found, full(protocol.Status, held_back=""), {"run": 1})


def _watch():
    one = full(figures.ProcessFigures)
    lists = {"processes": [one], "refused": [full(figures.Refusal)]}
    found = full(figures.Figures, **lists, stopped_seconds=[])
    with watch.live() as tell:
        tell(found)
        tell(dataclasses.replace(found, seconds=found.seconds + 1))


def _demo():
    snapshot = full(snapshots.Snapshot)
    lists = {
        "merges": [full(run.Merge)],
        "proofs": [full(proofs.Proof)],
        "ksmd": full(ksmd.Cost),
    }
    demo.show(full(run.Result, before=snapshot, after=snapshot, **lists))


def _doctor():
    fails = full(doctor.Entry, works=False, name="userfaultfd_wp_async")
    works = full(doctor.Entry, purpose="does what a feature does", informs=False)
    doctor_report.show([fails, works], [full(doctor.EngineEntry)])


def _diagnosis():
    part = full(diagnosis.Part)
    diagnosis_report.show([full(diagnosis.Diagnosis, parts=[part], error=None)])


def _bench():
    goal = results.Goal(at_least=2e12)
    values = [1234567.0, 7654321.0, 98765432.0]
    rows = [
        results.Row(
            title="the second copy of some memory",
            measures=[
                results.Measure("a_ratio", "time, held against a plain memcmp", values),
                results.Measure("b_bytes_per_second", "speed", [1e18, 2e18], goal),
            ],
        ),
        results.Row(title="another", skipped="it is not possible here"),
    ]
    tables.out().print(bench_report.table(rows, results.Options(5, 512 << 20)))


def _programs():
    snapshot = full(snapshots.Snapshot)
    looks = [measure.Look(seconds, snapshot) for seconds in (0.0, 10.0, 60.0)]
    done = measure.Outcome("redis", "five servers", before=snapshot, looks=looks)
    tables.out().print(programs_report.table(done))


def _experiment():
    look = full(cases.Look)
    found = [full(cases.Case, name=name, looks=[look]) for name in cases.CASES[:1]]
    tables.out().print(experiment._table(found, 1000))


def _guests():
    look = full(recording.Look)
    names = scanners.CASES
    found = [
        guests.Case(name, [look], [1e6], pieces=[work.Piece("1", 0, "read", 1e6)])
        for name in names
    ]
    figures_ = dict.fromkeys(names, full(outcome.Outcome))
    tables.out().print(scanner_report.table(found, figures_, "machine"))


def _pairs():
    effects = dict.fromkeys(outcome.BY, full(pair_report.Effect))
    tables.out().print(pair_report.table("8 workers of gunicorn", effects))


def _kernel():
    verdict = Verdict(123_456, 234_567, 345_678, ())
    done = {name: {"ksm_tests": verdict} for name in kernel.KERNELS}
    tables.out().print(kernel._table(done))


PRINTERS = {
    "estimate": _estimate,
    "merge": lambda: merge.show(_outcomes(), others.Wishes()),
    "merge --dry-run": lambda: merge.show(_outcomes(), others.Wishes(dry_run=True)),
    "unmerge": lambda: merge.show_unmerged(_outcomes()),
    "stat": _stat,
    "watch": _watch,
    "demo": _demo,
    "doctor": _doctor,
    "doctor PID": _diagnosis,
    "bench": _bench,
    "bench.programs": _programs,
    "bench.experiment": _experiment,
    "bench.scanner guests": _guests,
    "bench.scanner pairs": _pairs,
    "kernel": _kernel,
}
