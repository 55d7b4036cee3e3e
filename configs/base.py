"""Every knob, with values under which the main job runs anywhere: two cores, no network, no accelerator.

    python -m lco_jax.train --config=configs/base.py --workdir=runs/mine --config.optimizer.learning_rate=1e-3
    python -m lco_jax.train --config=configs/qwen2_5_vl_7b.py:reference

What follows the colon names a recipe (configs/recipes.py). The other files here say only what differs from this one.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str = "") -> ConfigDict:
    """The base configuration, with `recipe` ("", "paper" or "reference") applied."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0  # of the adapter, the data order and dropout

    config.model = ConfigDict()
    config.model.path = (
        "builtin:lab"  # a folder, a hub id, or a built-in checkpoint (builtin:lab, builtin:tiny)
    )
    config.model.dtype = "float32"  # of the frozen base and the activations: float32 or bfloat16
    config.model.tower_dtype = ""  # of the frozen towers; "": the same
    config.model.quantize = ""  # the frozen decoder's matrices in fewer bits: int8, or nf4 (QLoRA)
    # what a layer keeps for its backward pass, from the least memory to the least recomputation: full (nothing),
    # attention, gate, mlp, none (nothing is recomputed); auto: what the device's memory holds, as its compiler says
    config.model.remat = "auto"
    config.model.attention = (
        "auto"  # the decoder's kernel: auto (the machine's own), xla, cudnn, triton, splash
    )

    config.tune = ConfigDict()
    # of the decoder: lora (adapters), full (all of it, in float32), projection (nothing; a matrix behind the model)
    config.tune.decoder = "lora"
    config.tune.towers = "none"  # pretrain alone: or projectors, all

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.use_rslora = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    config.lora.targets = r"layers\.(self_attn|mlp)\.\w+_proj"  # pattern over whole module paths

    config.data = ConfigDict()
    # name -> kind (jsonl, tfds, files, parquet), its arguments, and a weight in the mixture (by default its size)
    config.data.sources = {
        "bundled": {
            "kind": "jsonl",
            "path": "assets:lab/train.jsonl",
        }
    }
    config.data.on_bad = (
        "error"  # a bad record stops the run by file and line; "skip" leaves it out and says so
    )
    config.data.batches = "mixed"  # or homogeneous: all records of a batch from one source
    config.data.threads = 2  # that read and prepare records
    config.data.media = ConfigDict()  # caps (lco_jax.MediaConfig says more); the reference's
    config.data.media.image_max_side = (
        700  # larger images are shrunk to fit a square of so many pixels
    )
    config.data.media.fps = 2.0  # frames a second taken of a video
    config.data.media.max_frames = 64  # the most of one video
    config.data.media.video_max_pixels = 602_112  # of a frame
    config.data.media.max_audio_seconds = 300.0  # longer sound is cut, with a warning
    config.data.media.use_audio_in_video = False  # a video's sound track is embedded with it
    config.data.media.allow_remote = False  # fetch http(s) URLs
    config.data.max_negatives = -1  # hard negatives used of a record; -1: all
    config.data.max_length = 64  # tokens of a text, before the template

    config.train = ConfigDict()
    config.train.batch_size = 64  # records of a global batch; all of their texts are candidates
    config.train.steps = 0  # 0: as many as `epochs` makes
    config.train.epochs = 1.0
    config.train.temperature = 0.03
    config.train.two_way = False  # CLIP's loss: positives find their anchors, too
    config.train.ignore_duplicates = (
        False  # whatever says the same as a positive is no negative of its anchor
    )
    # gather them on every device, or leave each device its share (ring: how records come by their sides); auto: the
    # latter where gathered ones and their gradient would take more than 1 GiB a device
    config.train.candidates = "auto"  # or gather, ring
    config.train.chunk_tokens = (
        0  # GradCache: tokens a device embeds at a time; 0: all; -1: what fits
    )
    config.train.max_nonfinite = 5  # so many non-finite steps in a row stop the run
    # a loss that lies more than so many (median absolute) deviations above the median of the last steps' is told in
    # incidents.jsonl with the records of the highest; as is one that is not finite. 0: the latter alone
    config.train.spike = 20.0
    config.train.patience = (
        300.0  # seconds without the end of a step (six times as many for the first) end the process
    )

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3  # the peak
    config.optimizer.schedule = "cosine"  # or linear, constant
    config.optimizer.warmup_steps = 10
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.mesh = ConfigDict()  # devices; -1: whatever the others leave
    config.mesh.data = -1  # copies of the model
    config.mesh.fsdp = 1  # ways a weight is split between copies that share it
    config.mesh.tensor = 1  # ways a matrix product is split

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 50  # steps
    config.checkpoint.keep = 2

    config.eval = ConfigDict()
    # held-out records, jsonl, each file scored on its own; "": none
    config.eval.path = "assets:lab/text.jsonl,assets:lab/image.jsonl,assets:lab/audio.jsonl"
    config.eval.batch_size = 64

    config.export = ConfigDict()
    config.export.merged = True  # beside the adapter, the whole model
    config.export.dtype = "float32"  # or bfloat16

    config.log = ConfigDict()
    config.log.tensorboard = False
    config.log.wandb_project = ""
    return recipes.apply(config, recipe)
