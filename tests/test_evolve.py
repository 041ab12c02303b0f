"""Evolution: what a block is worth, which go and which are copied, what it costs in time; and that it resumes."""

import pytest
import torch
from small_fusion import small_fusion
from weights import random_weights

from snapgen import io
from snapgen.distill.evolve import Action, EvolveConfig, choose, evolve
from snapgen.distill.latency import REST, LatencyTable, key, measure

pytestmark = pytest.mark.method

MID = "middle.blocks.0"
ATTENTION = "middle.blocks.1"
UP = "up_stages.1.layers.1.blocks.0"  # R 32+32>32, reads a skip


def table(net, **changes) -> LatencyTable:
    times = {key(net, name): 1.0 for name in net.places}
    return LatencyTable({**times, REST: 2.0, **changes})


def actions(**values: tuple[float, float]) -> dict[str, Action]:
    names = {"mid": MID, "attention": ATTENTION, "up": UP}
    return {names[name]: Action(names[name], 0.5 - lost, lost, saved) for name, (lost, saved) in values.items()}


def test_a_value_is_quality_lost_for_each_millisecond_saved():
    assert Action(MID, 0.4, 0.1, 2.0).value == 0.05
    assert Action(MID, 0.6, -0.1, 2.0).value == -0.05


def test_the_least_valuable_go_until_the_latency_is_met():
    net = small_fusion()
    found = actions(mid=(0.10, 1.0), attention=(0.12, 4.0), up=(0.01, 0.5))  # values 0.10, 0.03, 0.02
    plan = EvolveConfig(latency=10.0, group=2)
    assert choose(net, found, 12.0, plan, last=False) == ("drop", [UP, ATTENTION])
    assert choose(net, found, 10.4, plan, last=False) == ("drop", [UP])
    assert choose(net, found, 30.0, EvolveConfig(latency=10.0, group=1), last=False) == ("drop", [UP])


def test_once_it_is_met_the_most_valuable_are_copied():
    net = small_fusion()
    found = actions(mid=(0.10, 1.0), attention=(0.12, 4.0), up=(0.90, 0.5))
    plan = EvolveConfig(latency=10.0, group=1)
    assert choose(net, found, 10.0, plan, last=False) == ("copy", [MID])  # what reads a skip cannot be copied
    both = EvolveConfig(latency=10.0, group=2)
    assert choose(net, found, 10.0, both, last=False) == ("copy", [MID, ATTENTION])
    # The last round leaves nothing above the objective.
    assert choose(net, found, 9.5, both, last=True) == ("keep", [])
    assert choose(net, found, 8.5, both, last=True) == ("copy", [MID])


@pytest.mark.parametrize("change", [dict(latency=0.0), dict(latency=1.0, rounds=0), dict(latency=1.0, group=0)])
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match=f"{list(change)[-1]}: got"):
        EvolveConfig(**change)


def test_latency_is_the_sum_of_the_blocks_and_the_rest(tmp_path):
    net = small_fusion()
    times = table(net, **{"A 64 2x2": 5.0})
    attentions = sum(place.kind == "A" and place.stage == 1 for place in net.places.values())
    assert attentions == 2
    assert times.total(net) == 2.0 + 1.0 * (len(net.places) - 2) + 5.0 * 2
    assert times.block(net, ATTENTION) == 5.0
    assert key(net, UP) == "R 32+32>32 4x4"
    assert key(net, "down_stages.1.layers.0.blocks.0") == "R 32>64 2x2"
    times.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == times
    del times.milliseconds["A 64 2x2"]
    with pytest.raises(ValueError, match="table: has no entry 'A 64 2x2'"):
        times.total(net)
    io.write_json(tmp_path / "bad.json", {"milliseconds": {"rest": "fast"}})
    with pytest.raises(io.CheckpointError, match="must hold milliseconds"):
        LatencyTable.load(tmp_path / "bad.json")


def test_measured_times_cover_the_net():
    net = small_fusion(sample_size=16)
    found = measure(net, batch=2, tokens=8, repeats=3)
    assert found.milliseconds.keys() == {REST, *(key(net, name) for name in net.places)}
    assert all(value > 0 for value in found.milliseconds.values()) and found.device
    assert found.total(net) == pytest.approx(
        found.milliseconds[REST] + sum(found.milliseconds[key(net, name)] for name in net.places)
    )
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert net.training


def test_evolution_drops_what_is_worth_least(tmp_path):
    """With a quality that is known for every net, the rounds can be worked out by hand."""
    worth = {MID: 0.3, ATTENTION: 0.05, UP: 0.2}
    trained = []

    def quality(net):
        # Blocks are told by their weights, which move with them.
        kept = [weight for name, weight in worth.items() if name in net.places and name not in net.skipped]
        return sum(kept) + 1.0 * (len(net.places) - len(net.skipped) - len(kept))

    def training(net, folder):
        trained.append(folder.parent.name)
        return net

    net = random_weights(small_fusion())
    blocks = len(net.places)
    plan = EvolveConfig(latency=2.0 + blocks - 2, rounds=3, group=1)
    result = evolve(net, quality=quality, training=training, table=table(net), config=plan, out=tmp_path)
    report = io.read_json(tmp_path / "report.json")
    first, second, third = report["rounds"]
    assert (first["action"], first["blocks"], first["latency"]) == ("drop", [ATTENTION], 2.0 + blocks)
    assert first["values"][UP] == pytest.approx(
        dict(quality=first["quality"] - 0.2, lost=0.2, milliseconds=1.0, value=0.2)
    )
    assert (second["action"], second["blocks"]) == ("drop", [UP])
    assert (third["action"], third["met"]) == ("keep", True)
    assert trained == ["round-01", "round-02", "round-03", "final"]
    assert report["final"]["met"] and report["final"]["latency"] == plan.latency
    assert len(result.places) == blocks - 2 and result.config["mid"] == "R"


def test_an_interrupted_evolution_goes_on_where_it_was(tmp_path):
    start = random_weights(small_fusion())
    plan = EvolveConfig(latency=2.0 + len(start.places) - 2, rounds=3, group=1)
    text, z = torch.randn(1, 3, 32), torch.randn(1, 8, 4, 4)
    asked = []

    def go(out, stop=None):
        def quality(net):
            asked.append(net.skipped)
            if stop is not None and len(asked) == stop:
                raise KeyboardInterrupt
            with torch.no_grad():
                return -float(net(z, 500, text, None, torch.ones(1, 32)).sample.square().mean())

        def training(net, folder):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.01)
            return net

        net = random_weights(small_fusion())
        return evolve(net, quality=quality, training=training, table=table(start), config=plan, out=out)

    alone = go(tmp_path / "alone")
    needed = len(asked)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", stop=needed // 2)
    assert list((tmp_path / "cut").glob("round-*/round.json"))
    resumed = go(tmp_path / "cut")
    assert len(asked) == needed + 1  # only the one that was cut off was asked for again
    assert io.read_json(tmp_path / "cut" / "report.json") == io.read_json(tmp_path / "alone" / "report.json")
    own, other = alone.state_dict(), resumed.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    with pytest.raises(ValueError, match="holds another evolution \\(group differ\\)"):
        evolve(
            small_fusion(),
            quality=lambda net: 0.0,
            training=lambda net, folder: net,
            table=table(start),
            config=EvolveConfig(latency=plan.latency, rounds=3, group=2),
            out=tmp_path / "cut",
        )
