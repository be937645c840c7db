"""Does ``llm2clip compare --blind`` find which questions a gain comes from? Simulated models whose
gain is planted in the questions that can be solved without the picture, or in the others.

    python -m scripts.benchmarks.blind

Four in ten questions can be solved blind, by models that know the answer. A model sees, or knows,
what it answers right, and guesses the rest; both sides share most of what they see and know.
``visual``, ``blind``: how often a difference is shown (adjusted p below .05) in the questions that
need eyes, and in those that are solved blind. ``if known``: how often the same test shows it in the
questions that cannot be solved blind, if someone said which these are: more is in no log.
"""

import argparse
import zlib
from dataclasses import dataclass

import numpy as np

from llava_integration.evaluator.compare.blind import (
    EYES,
    RIGHT,
    SOLVED,
    Part,
    adjusted_parts,
    part_of,
    part_weights,
)

Rng = np.random.Generator
LEVEL = 0.95
SOLVABLE = 0.4  # of the questions
SHARED = 0.6  # of what a side sees or knows


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Two models, and whose answers without pictures there are."""

    questions: int = 1000
    options: int = 4  # 0: free text, which nobody guesses
    knows: tuple[float, float] = (0.6, 0.6)  # of the solvable questions: base, new
    sees: tuple[float, float] = (0.4, 0.4)  # of the others
    # blind logs: of "another" model, which solves ``caught`` of the solvable questions, of "two
    # others", or of "both" sides, which solve what they know, and guess as with the picture
    logs: str = "another"
    caught: float = 1.0
    # of yes-or-no questions: how often base, new and the blind model say yes where they guess
    says_yes: tuple[float, float, float] | None = None
    # orders of the options in which a question must be right; a guess goes with the option, or is
    # made anew for each order
    rotations: int = 1
    guesses_anew: bool = False

    @property
    def name(self) -> str:
        """What is planted."""
        planted = "no gain"
        gains = {
            "blind": self.knows[1] - self.knows[0],
            "visual": self.sees[1] - self.sees[0],
        }
        listed = [f"{kind} {gain:+.0%}" for kind, gain in gains.items() if gain > 0]
        if listed:
            planted = " and ".join(listed)
        options = f"{self.options} options" if self.options else "free text"
        logs = {
            "another": "log of another model",
            "two others": "logs of two others",
            "both": "logs of both sides",
        }[self.logs]
        if self.caught < 1:
            logs += f" that miss{'es' if self.logs == 'another' else ''} {1 - self.caught:.0%}"
        if self.says_yes:
            base, new, blind = self.says_yes
            options = (
                f"yes or no, guessed yes by {base:.0%} and {new:.0%}, blind {blind:.0%}"
            )
        if self.rotations > 1:
            guess = "anew in each" if self.guesses_anew else "with the option"
            options += f" in {self.rotations} orders, guessed {guess}"
        return f"{self.questions} questions, {options}, {planted}; {logs}"

    @property
    def chances(self) -> tuple[float, float]:
        """The least and the most that a guess may be right, as far as logs tell."""
        most = 1 / self.options if self.options else 0.0
        return most**self.rotations, most


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """N simulated questions."""

    base_N: np.ndarray  # scores
    new_N: np.ndarray
    blind_JN: np.ndarray  # of the J blind logs
    is_yes_N: np.ndarray | None  # of yes-or-no questions: which have the answer yes
    solvable_N: np.ndarray  # which can be solved blind


def draw(setting: Setting, rng: Rng) -> Drawn:
    """The questions of one simulated comparison."""
    count = setting.questions
    is_yes_N = rng.random(count) < 0.5 if setting.says_yes else None

    def guesses(side: int) -> np.ndarray:
        """(N,) whether a guess of base, new or the blind model is right."""
        if setting.says_yes is None or is_yes_N is None:
            least, most = setting.chances
            return rng.random(count) < (least if setting.guesses_anew else most)
        return (rng.random(count) < setting.says_yes[side]) == is_yes_N

    solvable_N = rng.random(count) < SOLVABLE
    difficulty_N = rng.random(count)
    sides = []
    blind_logs = []
    for side, (knows, sees) in enumerate(zip(setting.knows, setting.sees, strict=True)):
        luck_N = np.where(rng.random(count) < SHARED, difficulty_N, rng.random(count))
        known_N = solvable_N & (luck_N < knows)
        seen_N = ~solvable_N & (luck_N < sees)
        guessed_N = guesses(side)
        sides.append((known_N | seen_N | guessed_N).astype(float))
        blind_logs.append((known_N | guessed_N).astype(float))
    if setting.logs != "both":
        blind_logs = []
        for _ in range(1 if setting.logs == "another" else 2):
            known_N = solvable_N & (rng.random(count) < setting.caught)
            guessed_N = ~solvable_N & guesses(2)
            blind_logs.append((known_N | guessed_N).astype(float))
    base_N, new_N = sides
    return Drawn(
        base_N=base_N,
        new_N=new_N,
        blind_JN=np.array(blind_logs),
        is_yes_N=is_yes_N,
        solvable_N=solvable_N,
    )


def parts_of(setting: Setting, drawn: Drawn) -> list[Part]:
    """Both parts of a comparison, as the blind logs tell them."""
    count = len(drawn.base_N)
    least, most = setting.chances
    weights_of = part_weights(
        np.any(drawn.blind_JN >= RIGHT, axis=0),
        np.full(count, most),
        len(drawn.blind_JN),
        drawn.is_yes_N,
        least_chance_N=np.full(count, least),
    )
    return parts_with_weights(drawn, weights_of)


def parts_if_known(drawn: Drawn) -> list[Part]:
    """Both parts, if it were known which questions can be solved blind."""
    solvable_N = drawn.solvable_N.astype(float)
    return parts_with_weights(
        drawn,
        {SOLVED: (solvable_N, solvable_N), EYES: (1 - solvable_N, 1 - solvable_N)},
    )


def parts_with_weights(
    drawn: Drawn, weights_of: dict[str, tuple[np.ndarray, np.ndarray]]
) -> list[Part]:
    """Both parts, each with the weights of its questions in both readings."""
    clusters = [str(number) for number in range(len(drawn.base_N))]
    base_MN = drawn.base_N[None]
    new_MN = drawn.new_N[None]
    parts = []
    for name, weights in weights_of.items():
        part = part_of(name, base_MN, new_MN, clusters, weights, level=LEVEL)
        parts.append(part)
    return adjusted_parts(parts)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How often a difference is shown."""

    visual: float  # in the questions that need eyes
    blind: float  # in those solved blind
    # in the former, if it were known which can be solved blind; None: no gain is planted there
    if_known: float | None


def simulate(setting: Setting, simulations: int) -> Outcome:
    """The outcome of so many simulations; their seed is of the setting's name."""
    rng = np.random.default_rng(zlib.crc32(setting.name.encode()))
    has_visual_gain = setting.sees[0] != setting.sees[1]
    visual = 0
    blind = 0
    if_known = 0
    for _ in range(simulations):
        drawn = draw(setting, rng)
        solved, eyes = parts_of(setting, drawn)
        visual += is_shown(eyes)
        blind += is_shown(solved)
        if has_visual_gain:
            _, known_eyes = parts_if_known(drawn)
            if_known += is_shown(known_eyes)
    return Outcome(
        visual=visual / simulations,
        blind=blind / simulations,
        if_known=if_known / simulations if has_visual_gain else None,
    )


def is_shown(part: Part) -> bool:
    """Whether a part has a difference."""
    return part.verdict in ("better", "worse")


MORE_KNOWN = (0.6, 0.8)
MORE_SEEN = (0.4, 0.6)


def settings() -> list[Setting]:
    """The settings of the table."""
    listed = []
    for logs, caught in (("another", 1.0), ("another", 0.8), ("both", 1.0)):
        for options in (4, 2, 0):
            about = {"logs": logs, "caught": caught, "options": options}
            listed.append(Setting(knows=MORE_KNOWN, **about))
            listed.append(Setting(sees=MORE_SEEN, **about))
    listed += [
        Setting(knows=MORE_KNOWN, logs="two others", caught=0.8),
        Setting(sees=MORE_SEEN, logs="two others", caught=0.8),
        Setting(knows=MORE_KNOWN, sees=MORE_SEEN),
        Setting(),
        Setting(logs="both"),
        Setting(options=2, says_yes=(0.5, 0.8, 0.8)),
        Setting(options=2, says_yes=(0.3, 0.6, 0.3), questions=3000),
        Setting(sees=MORE_SEEN, options=2, says_yes=(0.5, 0.5, 0.7), questions=3000),
        Setting(sees=MORE_SEEN, options=2, questions=2000),
        Setting(sees=MORE_SEEN, options=2, questions=4000),
        Setting(sees=MORE_SEEN, options=2, questions=1500, logs="both"),
        *rotated(guesses_anew=False),
        *rotated(guesses_anew=True),
        Setting(knows=MORE_KNOWN, questions=100),
        Setting(knows=MORE_KNOWN, questions=5000, caught=0.8),
        Setting(knows=MORE_KNOWN, questions=5000, logs="both"),
    ]
    return listed


def rotated(*, guesses_anew: bool) -> list[Setting]:
    """MMBench: four orders of four options."""
    about = {"rotations": 4, "guesses_anew": guesses_anew}
    return [Setting(knows=MORE_KNOWN, **about), Setting(sees=MORE_SEEN, **about)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000)
    args = parser.parse_args()
    print("| setting | visual | if known | blind |")
    print("|---|--:|--:|--:|")
    for setting in settings():
        shares = simulate(setting, args.simulations)
        if_known = "" if shares.if_known is None else f"{shares.if_known:.1%}"
        columns = f"{shares.visual:.1%} | {if_known} | {shares.blind:.1%}"
        print(f"| {setting.name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
