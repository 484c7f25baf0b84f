"""Deals the faults of `scripts/torture`: in a random order, every kind at every moment before any comes again."""

MOMENTS = ("start", "compile", "step", "save", "restore")
# After each of these the launcher starts the group anew.
FATAL = (
    # SIGKILL is the commonest: of the coordinator and of another.
    *((how, what, who) for how, who in (("kill", "first"), ("kill", "other")) for what in MOMENTS),
    *((how, what, "any") for how in ("stop", "spin", "hold", "error") for what in MOMENTS),
    ("kill", "delete", "first"),  # process 0 alone deletes
)
# And after these it starts nothing: all processes have saved and ended, or it has gone itself.
LAST = tuple((how, what, "any") for how in ("term", "term to launcher", "launcher") for what in MOMENTS)
_FROM_OUTSIDE = ("kill", "stop", "launcher")  # whatever the process does meanwhile
_SIGTERM = ("term", "term to launcher")


class Deck:
    """Deals cards in a random order; shuffled anew when none that fits is left."""

    def __init__(self, rng, cards):
        self._rng, self._all, self._left = rng, cards, []

    def deal(self, fits=lambda card: True):
        while True:
            for card in self._left:
                if fits(card):
                    self._left.remove(card)
                    return card
            self._left += self._rng.sample(self._all, len(self._all))


class Dealer:
    """Draws what goes wrong in one launch, each sure to come about.

    Every start restores, compiles, takes a step or evaluates, and saves; but only the first start of a run is sure to
    do so more than once, and to delete.
    """

    def __init__(self, rng):
        self._rng, self._fatal, self._last = rng, Deck(rng, FATAL), Deck(rng, LAST)

    def draw(self, processes, *, first):
        """One to three faults, one after the other; with `first`, of the run's first launch."""
        rng, faults = self._rng, []
        ends = rng.random() < 0.5
        for _ in range(rng.randint(0 if ends else 1, 2 if ends else 3)):
            fresh = first and not faults
            card = self._fatal.deal(lambda card, fresh=fresh: fresh or card[1] != "delete")
            faults.append(self._fault(card, processes, fresh=fresh))
        if ends:
            faults.append(self._fault(self._last.deal(), processes, fresh=first and not faults))
            # Preempted, and killed before the grace was over.
            if faults[-1]["how"] in _SIGTERM and faults[-1]["what"] != "save" and rng.random() < 0.3:
                faults.append(
                    {"process": rng.randrange(processes), "what": "save", "nth": 1, "how": "kill", "delay": 0}
                )
        return faults

    def _fault(self, card, processes, *, fresh):
        how, what, who = card
        rng = self._rng
        nth = rng.randint(1, 10 if what == "step" else 3) if fresh and what in ("step", "save") else 1
        # What is deleted is in a thread of process 0, whose stacking up stops nothing: so at once.
        delays = (0, rng.uniform(0, 0.1), rng.uniform(0, 1)) if how in _FROM_OUTSIDE and what != "delete" else (0,)
        process = {"first": 0, "other": rng.randrange(1, processes), "any": rng.randrange(processes)}[who]
        return {"process": process, "what": what, "nth": nth, "how": how, "delay": rng.choice(delays)}
