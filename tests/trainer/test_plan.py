"""What a dry run says of memory."""

import pytest
import torch

from pipelines.contracts import Batch, Source
from trainer import manifest as manifests
from trainer import plan


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_memory_of_a_rank(zero, small_dataset):
    manifest = manifests.load(
        "manifests/demo.yaml", [f"data={{train: {small_dataset}}}", f"zero.stage={zero}", "workers.count=[1, 4]"]
    )
    facts = plan.dry_run(manifest)
    total = facts["parameters"]["total"]
    for memory, share in zip(facts["memory"], facts["batch"]["workers"], strict=True):
        world = memory["workers"]
        assert memory["weights"] == total * 4 // (world if zero == 3 else 1)
        trained = memory["optimizer"] * (world if zero else 1) // 8
        assert trained <= total
        assert memory["gradients"] == pytest.approx(trained * 4 / (world if zero >= 2 else 1), abs=4)
        assert memory["activations"] == facts["memory"][0]["activations"] * share["micro_batch"] / manifest.batch


def test_activations_are_those_that_a_real_step_keeps(small_dataset):
    manifest = manifests.load("manifests/demo.yaml", [f"data={{train: {small_dataset}}}", "clip.sizes=[[32, 32]]"])
    recipe, schedule = manifest.loaded_recipe, manifest.schedule
    model, teachers = recipe.build(0), recipe.teachers()
    state = {w.untyped_storage().data_ptr() for net in (model, teachers) for w in net.state_dict().values()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in state:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    stage = schedule.stages[-1]
    for name, weight in model.named_parameters():
        weight.requires_grad_(stage.trains(name))
    batch = Batch(
        torch.zeros(1, 3, stage.clip.frames, 32, 32), torch.ones(1), torch.zeros(1), (0,), (Source("", "", ""),),
        schedule.plan(schedule.first_steps[-1]), 1.0, 0,
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        recipe.step(model, batch, stage, teachers)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    told, why = plan._activations(manifest, recipe.build(0))
    assert why is None and told == pytest.approx(real, rel=0.02)


def test_activations_without_a_teacher_s_weights_are_not_made_up(tmp_path, small_dataset):
    manifest = manifests.load(
        "manifests/demo.yaml",
        [f"data={{train: {small_dataset}}}", f"model.perceptual={{weights: {tmp_path / 'vgg.pth'}}}",
         "stages.frames-7.losses.lpips=0.5"],
    )  # fmt: skip
    memory = plan.dry_run(manifest)["memory"][0]
    assert memory["activations"] is None and "vgg.pth" in memory["why"]
