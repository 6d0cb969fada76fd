"""What differences have shown at a step is told to later steps alone, whatever was measured first."""

from itertools import permutations

from lsp_callbacks.step.known_scale import KnownScales, Scale

KEY = (None, False, True)
SHOWN = (Scale(1.0, 5.0, 2.0, 0.0), Scale(3.0, 4.0, 2.0, 1e-6), Scale(2.0, 1.0, 2.0, 0.0))


def test_the_order_of_the_measurements_of_a_step_does_not_matter():
    for order in permutations(SHOWN):
        scales = KnownScales()
        scales.note(3, KEY, Scale(9.0))
        for scale in order:
            scales.note(7, KEY, scale)
            assert scales.before(7, KEY) == Scale(9.0)
        assert scales.before(8, KEY) == Scale(3.0, 5.0, 2.0, 1e-6)
