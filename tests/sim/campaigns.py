"""The demo in simulation: a minute of calm, then up to four staged campaigns of twelve seconds each."""

from tests.sim.traffic import Traffic

DEMO = ("block_rate", "latency", "probing", "token_length")
"""What the four campaigns raise."""


def four_campaigns(
    seed: int, *, calm_s: float = 60, which: str = "brlt", span_s: float = 12, rate: float = 7.0
) -> Traffic:
    """`which`: b a burst of blocked prompts, r a probing session, l a latency attack, t long completions,
    d one prompt's variants by many users, v one client's flood of requests."""
    traffic = Traffic(seed, rate=rate)
    now_s = calm_s
    traffic.calm(0, now_s)
    for campaign in which:
        traffic.calm(now_s, span_s, slow=5.0 if campaign == "l" else 1.0)
        if campaign == "b":
            traffic.block_burst(now_s, span_s)
        elif campaign == "r":
            traffic.probe(now_s, span_s)
        elif campaign == "d":
            traffic.spread(now_s, span_s)
        elif campaign == "l":
            traffic.heavy(now_s, span_s)
        elif campaign == "v":
            traffic.flood(now_s, span_s)
        else:
            traffic.long_answers(now_s, span_s)
        traffic.calm(now_s + span_s, 4)
        now_s += span_s + 4
    traffic.calm(now_s, 10)
    return traffic
