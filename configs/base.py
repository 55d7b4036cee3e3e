"""Every key, with values for any machine: two cores, no network, no accelerator.

    python -m lco_jax.train --config=base --output=runs/mine --config.optimizer.learning_rate=1e-3
    python -m lco_jax.train --config=qwen2_5_vl_7b:reference

What follows the colon names a recipe or a preset (recipes.py). The other files here say only what
differs from this one. In a clone, --config=configs/base.py names the same file.
"""

from ml_collections import ConfigDict

from lco_jax.configs import recipes


def get_config(recipe: str = "") -> ConfigDict:
    """The base configuration, with `recipe` applied: "", or a name in recipes.py."""
    config = ConfigDict()
    config.name = "base"  # of the folder runs/NAME, and of the run in Weights & Biases
    config.seed = 0  # of the adapter, the data order and dropout
    _set_model(config)
    _set_data(config)
    _set_training(config)
    _set_surroundings(config)
    return recipes.apply(config, recipe)


def _set_model(config: ConfigDict) -> None:
    """The checkpoint, and which of its parameters are trained."""
    config.model = ConfigDict()
    # a folder, a hub id, or a built-in checkpoint (builtin:lab, builtin:tiny)
    config.model.path = "builtin:lab"
    config.model.dtype = "float32"  # of the frozen base and the activations, or bfloat16
    config.model.tower_dtype = ""  # of the frozen towers; "": the same
    config.model.quantize = ""  # store the frozen decoder's matrices as int8, or as nf4 (QLoRA)
    # What a layer stores for its backward pass, from the least memory to the least recomputation:
    # full (nothing), attention, gate, mlp, none (nothing is recomputed). auto chooses what the
    # device's memory holds, as the compiler reports it.
    config.model.remat = "auto"
    # the decoder's attention kernel: auto (the best of this machine), xla, cudnn, triton, splash
    config.model.attention = "auto"
    # what an embedding is made of: last (the last token's state) or mean (of all tokens' states)
    config.model.pooling = "last"

    config.tune = ConfigDict()
    # lora: adapters; full: every parameter of the decoder, in float32; projection: a matrix behind
    # the frozen model; none: nothing of it, for pretrain
    config.tune.decoder = "lora"
    # for pretrain also projectors, or towers by name (visual, vision_tower, audio_tower), between
    # commas, or all
    config.tune.towers = "none"

    config.lora = ConfigDict()
    config.lora.rank = 16  # of the product that is added to each matrix
    config.lora.alpha = 32.0  # the product is scaled by alpha / rank
    config.lora.dropout = 0.05  # of what goes into the product, while it is trained
    config.lora.use_rslora = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    config.lora.targets = r"layers\.(self_attn|mlp)\.\w+_proj"  # must match a full module path


def _set_data(config: ConfigDict) -> None:
    """What is read, and the caps on it."""
    config.data = ConfigDict()
    # name -> kind (jsonl, tfds, files, parquet), the arguments of that kind, and optionally its
    # weight in the mixture (by default its size) and its instructions. --data sets them
    config.data.sources = {
        "bundled": {
            "kind": "jsonl",
            "path": "assets:lab/train.jsonl",
        }
    }
    # error: a bad record stops the run by file and line; skip: it is left out and reported
    config.data.on_bad = "error"
    config.data.batches = "mixed"  # or homogeneous: all records of a batch from one source
    # of a mixed batch: so many records one after another come from one source, as its neighbours'
    # negatives; it divides train.batch_size
    config.data.sub_batch = 1
    # what a batch does not hold twice, beside records, where the data allow: positives, contents
    # (anchors and positives), or "": nothing
    config.data.keep_apart = ""
    # a source without a weight has that of its size to the power of 1 / this temperature; large
    # ones draw all sources alike
    config.data.sampling_temperature = 1.0
    config.data.threads = 2  # that read and prepare records
    config.data.media = ConfigDict()  # caps, the reference's; lco_jax.MediaConfig documents them
    config.data.media.image_max_side = 700  # an image is shrunk to this number of pixels, squared
    config.data.media.fps = 2.0  # frames a second that are taken of a video
    config.data.media.max_frames = 64  # the most of one video
    config.data.media.video_max_pixels = 602_112  # of a frame
    config.data.media.max_audio_seconds = 300.0  # longer sound is cut, with a warning
    config.data.media.use_audio_in_video = False  # embed a video's sound track with it
    config.data.media.allow_remote = False  # fetch http(s) URLs
    config.data.max_negatives = -1  # hard negatives used of a record; -1: all
    config.data.max_length = 64  # tokens of a text, before the template

    # words about the task beside contents; a source may have its own, also "", as
    # query_instruction and document_instruction
    config.instructions = ConfigDict()
    config.instructions.query = ""  # beside anchors; "": nothing
    config.instructions.document = ""  # beside positives and negatives; "": nothing
    # where it stands, word for word: before (the content), after (it, and before the prompt for one
    # word), instead (of that prompt), system (in a system turn)
    config.instructions.place = "before"


def _set_training(config: ConfigDict) -> None:
    """The loss, the batches and the optimiser."""
    config.train = ConfigDict()
    config.train.batch_size = 64  # records of a global batch; all of their texts are candidates
    config.train.steps = 0  # 0: as many as `epochs` makes
    config.train.epochs = 1.0  # passes over the records, where `steps` is 0
    config.train.temperature = 0.03  # of InfoNCE; cosines are divided by it
    config.train.two_way = False  # CLIP's loss: positives find their anchors, too
    # a candidate with the same content as an anchor's positive is no negative of that anchor
    config.train.ignore_duplicates = False
    # GradCache: tokens that a device embeds at a time; 0: all; -1: as many as memory holds
    config.train.chunk_tokens = 0
    config.train.max_nonfinite = 5  # this number of non-finite steps in a row stops the run
    # a process ends when no step ends for this number of seconds (six times it for the first)
    config.train.patience = 300.0

    _set_loss(config)
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3  # the peak
    config.optimizer.schedule = "cosine"  # or linear, constant
    # over which the rate rises from 0; at most a fifth of a run whose steps follow from epochs
    config.optimizer.warmup_steps = 10
    config.optimizer.beta1 = 0.9  # of AdamW's mean of gradients
    config.optimizer.beta2 = 0.999  # of its mean of their squares
    config.optimizer.eps = 1e-8  # in its denominator
    config.optimizer.weight_decay = 0.0  # of AdamW
    config.optimizer.clip_norm = 1.0  # longer gradients are cut to this norm; 0: none is


def _set_loss(config: ConfigDict) -> None:
    """What may be added to the paper's loss; the defaults add nothing."""
    config.loss = ConfigDict()
    # temperatures of text, image, video and audio in place of train.temperature; (): that one for
    # all. A pair has the mean of its two contents'.
    config.loss.temperatures = ()
    config.loss.learn_temperature = False  # train them, from these values
    # prefixes of vectors that are embeddings, too (Matryoshka): (512, 256, 128)
    config.loss.matryoshka = ()
    config.loss.matryoshka_weights = ()  # of the whole vector and of each prefix; (): equal
    # a candidate that scores above the positive less the margin is no negative. Whose scores: own
    # (this model's), base (the model before tuning), guide (another's); "": all are
    # negatives
    config.loss.false_negatives = ""
    config.loss.false_negative_margin = 0.0  # how far below the positive's score that begins
    config.loss.guide = ""  # the folder of vectors that lco mine --model=GUIDE made of the records
    config.loss.hard_weight = 1.0  # how many times a record's own hard negatives count
    # learn a teacher's scores, teacher_scores of a record: kl, margin_mse, or "": no
    config.loss.teacher = ""
    config.loss.teacher_weight = 1.0  # of what is learned of the teacher
    config.loss.teacher_temperature = 1.0  # of the teacher's softmax, for kl
    config.loss.coral = 0.0  # weight of a term that aligns the covariances of modalities


def _set_surroundings(config: ConfigDict) -> None:
    """Devices, checkpoints, evaluation, outputs."""
    config.mesh = ConfigDict()  # devices; -1: whatever the others leave
    config.mesh.data = -1  # copies of the model
    config.mesh.fsdp = 1  # ways that a weight is split between copies that share it
    config.mesh.tensor = 1  # ways that a matrix product is split

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 50  # steps between two checkpoints
    config.checkpoint.keep = 2  # the newest ones

    config.eval = ConfigDict()
    # held-out records, each file or dataset scored by itself; "": none. --eval sets it
    config.eval.path = "assets:lab/text.jsonl,assets:lab/image.jsonl,assets:lab/audio.jsonl"
    # the share of data.sources that is measured and never trained on (lco_jax/data/held_out.py)
    config.eval.share = 0.0
    # pairs with people's scores, each file scored by itself; builtin:stsb-dev is fetched; "": none
    config.eval.sts = ""
    config.eval.batch_size = 64  # the most inputs in a forward pass; None: any number

    config.export = ConfigDict()
    config.export.merged = True  # write the merged model beside the adapter
    config.export.dtype = "float32"  # of the merged model, or bfloat16
    # how many of the first numbers the vectors of merged/ and adapter/ have; None: as the base's
    config.export.truncate_dim = None

    config.log = ConfigDict()
    config.log.tensorboard = False  # write metrics for TensorBoard, too
    config.log.wandb_project = ""  # a project of Weights & Biases; "": none
