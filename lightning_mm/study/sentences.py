"""What a study says, in sentences: each is computed from numbers, with the interval that carries it.

Better and worse are said only where the corrected interval excludes zero; where none does, that no difference was
found. A difference that was not found may be there: the interval says how large it could be.

Data flow: ``StudyComparison`` + curves over layers -> ``Section``s of sentences -> study.md and study.html.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_mm.study.comparison import ALL, StudyComparison, TestComparison
from lightning_mm.study.layer_curves import Agreement, Peak, agreements, curve, peak_of
from lightning_mm.study.results import StudyResults
from lightning_mm.study.settings import START
from lightning_mm.study.statistics import Contrast
from lightning_mm.tuning.layers import describe_layers


@dataclass(frozen=True)
class Section:
    """A question and what the study says to it.

    Args:
        title: The question.
        sentences: The answers; the first is the shortest one.
    """

    title: str
    sentences: tuple[str, ...]


def tell(results: StudyResults, found: StudyComparison) -> list[Section]:
    """All that the study says; a question whose arms it does not have is left out.

    Args:
        results: Its results.
        found: What they come to.
    """
    main, control = results.settings.roles.main, results.settings.roles.control
    made = [
        Section(
            f"Is {main} better than {control} alone?",
            (*_against(found, lambda t: _of(t.against_control, main)), *_nats(found, main)),
        ),
        Section("Does any arm beat the control?", _arms(found)),
        Section(f"Is {main} better than its rivals of equal budget?", _against(found, lambda t: t.rivals)),
        Section(f"Is {main} better than training everything?", _full(results, found)),
        Section("What does it cost in text and facts?", _losses(results, found)),
        Section("Does auto choose better layers?", _auto(results, found)),
        Section("Does the picture count, and which questions stay at chance?", _pictures(results, found)),
        Section("Where do the layers know what?", _layers(results, found)),
        Section("Do causal layers agree with the geometry?", _causes(results, found)),
    ]
    return [each for each in made if each.sentences]


def verdict(contrast: Contrast, more: str = "better", less: str = "worse") -> str:
    """One word for a difference, by its corrected interval."""
    return more if contrast.is_higher else less if contrast.is_lower else "no difference found"


def points(contrast: Contrast) -> str:
    """A difference of shares with its corrected interval.

    Example:
        >>> points(Contrast("a", "b", 0.023, 0.004, 0.042, 0.001, 0.045, (0.02, 0.026), 300, 8))
        '+2.3 points (+0.1 to +4.5)'
    """
    return (
        f"{100 * contrast.value:+.1f} points "
        f"({100 * contrast.corrected_low:+.1f} to {100 * contrast.corrected_high:+.1f})"
    )


def nats(contrast: Contrast) -> str:
    """A difference in nats with its corrected interval."""
    return f"{contrast.value:+.3f} nats ({contrast.corrected_low:+.3f} to {contrast.corrected_high:+.3f})"


def covers(found: StudyComparison) -> str:
    """What the intervals mean."""
    seeds = (
        f"the draw of pictures and of {len(found.seeds)} seeds"
        if len(found.seeds) > 1
        else "the draw of pictures; one seed says nothing of how seeds differ"
    )
    return (
        f"Intervals are 95 % and cover {seeds}. In brackets they are corrected: those of one comparison hold together, "
        "over all arms that it compares; tests are not corrected for each other."
    )


def _of(given: Sequence[Contrast], arm: str) -> list[Contrast]:
    return [each for each in given if each.arm == arm]


def _against(found: StudyComparison, chosen: Callable[[TestComparison], Sequence[Contrast]]) -> tuple[str, ...]:
    """One sentence per test and difference, and one that sums them up."""
    told, words = [], []
    for test in found.tests.values():
        for each in chosen(test):
            word = verdict(each)
            words.append(word)
            share = test.rows[0].arms[each.arm].value
            told.append(
                f"{test.name}: {each.arm} answers {100 * share:.1f} % exactly, against {each.against} {points(each)}"
                f"{_seeds(each)}: {word}."
            )
    return (_summary(words), *told) if told else ()


def _nats(found: StudyComparison, arm: str) -> tuple[str, ...]:
    """How unlikely the right answers are to an arm, against the control: less is better."""
    return tuple(
        f"{test.name}: the right answers, {nats(each)} each against {each.against}: "
        f"{verdict(each, 'less likely', 'more likely')}."
        for test in found.tests.values()
        for each in _of(test.nats, arm)
    )


def _summary(words: Sequence[str]) -> str:
    better, worse, none = (words.count(word) for word in ("better", "worse", "no difference found"))
    if none == len(words):
        return "No difference found." if none == 1 else f"No difference found in any of {none} comparisons."
    if len(words) == 1:
        return f"{words[0].capitalize()}."
    parts = [f"{count} {word}" for count, word in ((better, "better"), (worse, "worse")) if count]
    parts += [f"no difference found in {none}"] if none else []
    return f"Of {len(words)} comparisons: {', '.join(parts)}."


def _seeds(contrast: Contrast) -> str:
    if len(contrast.by_seed) < 2:
        return ""
    return f", by seed {', '.join(f'{100 * value:+.1f}' for value in contrast.by_seed)}"


def _arms(found: StudyComparison) -> tuple[str, ...]:
    told = []
    for test in found.tests.values():
        better = [f"{each.arm} {points(each)}" for each in test.against_control if each.is_higher]
        worse = [f"{each.arm} {points(each)}" for each in test.against_control if each.is_lower]
        if not test.against_control:
            continue
        count = len(test.against_control)
        parts = [f"{word}: {'; '.join(arms)}" for word, arms in (("better", better), ("worse", worse)) if arms]
        told.append(f"{test.name}, {count} arms: {'. '.join(parts) or 'no difference found'}.")
    return tuple(told)


def _full(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    roles = results.settings.roles
    told = list(_against(found, lambda test: test.against_full))
    if not told:
        return ()
    for test in found.tests.values():
        for each in test.equal_cost:
            if each.against == roles.full:
                step, all_steps = found.costs[roles.full]["equal_step"], found.costs[roles.full]["steps"]
                told.append(
                    f"{test.name}, at equal FLOPs ({roles.full} after {step} of {all_steps} steps, its rate not yet "
                    f"down): {roles.main} {points(each)} against it: {verdict(each)}."
                )
    main, full = found.costs[roles.main], found.costs[roles.full]
    if main["flops"] and full["flops"]:
        seconds = (
            f" and {main['seconds'] / full['seconds']:.0%} of its seconds"
            if main["seconds"] and full["seconds"]
            else ""
        )
        told.append(
            f"A step of {roles.main} costs {main['flops'] / full['flops']:.0%} of {roles.full}'s FLOPs{seconds}."
        )
    return tuple(told)


def _losses(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    main, told = results.settings.roles.main, []
    if found.text and START in found.text:
        lost = [f"{each.arm} {nats(each)}" for each in found.text_contrasts if each.is_higher]
        kept = [each.arm for each in found.text_contrasts if not each.is_higher]
        told.append(
            f"Text: {found.text[START].value:.3f} nats per token before. "
            f"{'Lost: ' + '; '.join(lost) if lost else 'No loss found'}."
            + (f" No loss found: {', '.join(kept)}." if kept and lost else "")
        )
        told += _compared_losses(main, found.text_rivals, nats, "loses less text than", "loses more text than", False)
    if found.facts and START in found.facts:
        changed = [
            f"{each.arm} {points(each)}, {verdict(each)}"
            for each in found.facts_contrasts
            if each.is_higher or each.is_lower
        ]
        told.append(
            f"Facts without a picture: {100 * found.facts[START].value:.0f} % right before. "
            f"{'; '.join(changed) if changed else 'No change found in any arm'}."
        )
        told += _compared_losses(
            main, found.facts_rivals, points, "knows more facts than", "knows fewer facts than", True
        )
    return tuple(told)


def _compared_losses(
    main: str, given: Sequence[Contrast], spelled: Callable[[Contrast], str], good: str, bad: str, high_is_good: bool
) -> list[str]:
    """Which arms lose more than the main one, which less."""
    told = []
    for words, chosen in (
        (good, [each for each in given if (each.is_higher if high_is_good else each.is_lower)]),
        (bad, [each for each in given if (each.is_lower if high_is_good else each.is_higher)]),
    ):
        if chosen:
            told.append(f"{main} {words} {'; '.join(f'{each.against}, {spelled(each)}' for each in chosen)}.")
    rest = [each.against for each in given if not each.is_higher and not each.is_lower]
    if rest:
        told.append(f"No difference found between {main} and {', '.join(rest)}.")
    return told


def _auto(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    roles = results.settings.roles
    told = list(_against(found, lambda test: test.auto))
    if told:
        chosen = "; ".join(found.costs[roles.auto]["layers"])
        told.append(f"{roles.auto} chose {chosen}; {roles.main} is {'; '.join(found.costs[roles.main]['layers'])}.")
    return tuple(told)


def _pictures(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    main, told = results.settings.roles.main, []
    for test in found.tests.values():
        grounded = {arm: test.grounding[arm] for arm in (START, main) if arm in test.grounding}
        if grounded:
            parts = [
                f"{arm} {points(each)}" + ("" if each.is_higher else " (no difference found)")
                for arm, each in grounded.items()
            ]
            told.append(f"{test.name}, own picture against another one: {'; '.join(parts)}.")
        if main not in test.rows[0].arms:
            continue
        at_chance = [row.kind for row in test.rows if row.kind != ALL and row.arms[main].low <= row.majority]
        gained = [f"{kind} {points(each)}" for kind, each in test.by_type.items() if each.is_higher]
        lost = [f"{kind} {points(each)}" for kind, each in test.by_type.items() if each.is_lower]
        if at_chance:
            told.append(f"{test.name}: not above the most frequent answer in {main}: {', '.join(at_chance)}.")
        if test.by_type:
            parts = ([f"more: {'; '.join(gained)}"] if gained else []) + ([f"fewer: {'; '.join(lost)}"] if lost else [])
            told.append(
                f"{test.name}, {main} against {results.settings.roles.control} by question type (corrected for "
                f"{len(test.by_type)} types): {'. '.join(parts) or 'no difference found'}."
            )
    return tuple(told)


_LOOKS = {
    "entailment": "whether a caption fits the picture (entailment)",
    "objects": "which objects are there",
    "meeting": "picture and caption meet (neighborhood overlap)",
}


def _layers(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    main, told = results.settings.roles.main, []
    for look, words in _LOOKS.items():
        parts = [
            f"{'before' if arm == START else f'after {main}'}: {_peak_words(peak)}"
            for arm in (START, main)
            if arm in found.arms and (peak := peak_of(curve(results, arm, found.seeds, look))) is not None
        ]
        if parts:
            told.append(f"{words[0].upper()}{words[1:]}: {'; '.join(parts)}.")
    return tuple(told)


def _peak_words(peak: Peak) -> str:
    interval = "" if peak.low is None or peak.high is None else f", {peak.low:.3g} to {peak.high:.3g}"
    chance = "" if peak.null is None else f", chance {peak.null:.3g}"
    others = [layer for layer in peak.alike if layer != peak.layer]
    alike = f", layers {describe_layers(others)} not told apart" if others else ""
    clear = (
        f"; clear of chance in {len(peak.clear)} of {peak.num_layers} layers (all layers together)"
        if peak.null is not None
        else ""
    )
    at = "the embeddings" if peak.layer < 0 else f"layer {peak.layer}"
    return f"highest at {at} ({peak.measure} at {peak.site}: {peak.value:.3g}{interval}{chance}{alike}){clear}"


def _causes(results: StudyResults, found: StudyComparison) -> tuple[str, ...]:
    told = []
    for arm in (START, results.settings.roles.main):
        if arm not in found.arms or not (pairs := agreements(results, arm, found.seeds)):
            continue
        agree = [_agreement_words(each) for each in pairs if each.p_value <= 0.05 and each.correlation > 0]
        against = [_agreement_words(each) for each in pairs if each.p_value <= 0.05 and each.correlation < 0]
        strongest = max(pairs, key=lambda each: abs(each.correlation))
        parts = ([f"alike: {'; '.join(agree)}"] if agree else []) + (
            [f"opposite: {'; '.join(against)}"] if against else []
        )
        none = f"no agreement found; strongest {_agreement_words(strongest)}"
        told.append(f"{arm}, {len(pairs)} pairs of curves: {'. '.join(parts) or none}.")
    return tuple(told)


def _agreement_words(pair: Agreement) -> str:
    return (
        f"{pair.causal} with {pair.geometric} (rank correlation {pair.correlation:+.2f}, adjusted p {pair.p_value:.2f})"
    )
