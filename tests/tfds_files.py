"""TFDS datasets as array_record files, as TFDS writes them: no TensorFlow is needed."""

import io
import json

from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

CORE = "tensorflow_datasets.core.features"
TEXT = {"pythonClassName": f"{CORE}.text_feature.Text", "text": {}}
NUMBER = {
    "pythonClassName": f"{CORE}.scalar.Scalar",
    "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
}


def class_label(count):
    return {
        "pythonClassName": f"{CORE}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(count)},
    }


def shape(*sizes):
    return {"dimensions": [str(size) for size in sizes]}  # -1: any


def image_feature(*sizes):
    return {
        "pythonClassName": f"{CORE}.image_feature.Image",
        "image": {"dtype": "uint8", "shape": shape(*sizes)},
    }


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_tfds(data_dir, name, features, rows, labels=None, version="1.1.0"):
    """What TFDS's `builder.download_and_prepare(file_format="array_record")` leaves.

    features: as in features.json. rows: feature -> what its `tf.train.Feature` holds; a list of
    them is the split train, a mapping has a list for each split. labels: names by feature.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / name / version
    folder.mkdir(parents=True)
    content = {
        "pythonClassName": f"{CORE}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(content))
    for feature, names in (labels or {}).items():
        (folder / f"{feature}.labels.txt").write_text("\n".join(names) + "\n")
    splits = []
    for split, held in (rows if isinstance(rows, dict) else {"train": rows}).items():
        serialized = []
        for row in held:
            example = tf_example_pb2.Example()
            for feature, value in row.items():
                values = value if isinstance(value, list) else [value]
                kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
                getattr(example.features.feature[feature], kinds[type(values[0])]).value.extend(
                    values
                )
            serialized.append(example.SerializeToString())
        writer = ArrayRecordWriter(
            str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for record in serialized:
            writer.write(record)
        writer.close()
        entry = {"name": split, "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
        splits.append(
            entry | {"shardLengths": [str(len(held))], "numBytes": str(sum(map(len, serialized)))}
        )
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(data_dir)
