"""APTOS 2019, the paper's data set: fundus images in Kaggle's layout; EyePACS, which preceded it, is read as well."""

from pathlib import Path

import numpy as np

from dopamine_lib.data.dataset import (
    APTOS_IMAGES,
    APTOS_TEST,
    GRADE_PROPORTIONS,
    GRADES,
    Dataset,
    Datasheet,
    content_checksum,
    own_number,
    split_by_person,
)
from dopamine_lib.data.folder import BOTH_EYES, PIXELS, eye_of, find_images, find_table, read_table
from dopamine_lib.data.picture_files import decode_files, persons_by_pixels

#: A folder whose number of images is within this share of APTOS's is taken for APTOS as published.
_ABOUT = 0.1
_GET_IT = "get the data with: python data_download.py aptos"


def load_aptos(data_dir: str | Path, *, size: int = 224, seed: int = 0) -> Dataset:
    """Load ``data_dir/train.csv`` and ``data_dir/train_images/ID.png`` (or .jpg, .jpeg).

    ``data.folder`` says which other names and tables are understood.

    Images are uint8 (N, size, size, 3), preprocessed by ``images.read_image`` and memory-mapped from the
    kit's cache; labels are int64 (N,) in the order of ``train.csv``. Pixel-identical images count as one
    person, whose number is a hash of the pixels in the file. The seeded split approximates the paper's 2931/731:
    ``split_by_person``. A set of about APTOS's size is declared to have the paper's 2931 training patients, which is
    public; for any other no number is published. Of EyePACS, whose ids name the eye, both eyes are one person's.
    Raises InputError, naming file and row, for anything missing,
    unreadable or out of range.
    """
    table = find_table(Path(data_dir), _GET_IT)
    content = table.read_bytes()
    ids, labels = read_table(table, content)
    files = find_images(table.parent, ids)
    images, hashes = decode_files(files, size, content)
    eyes = [eye_of(name) for name in ids]
    eyepacs = None not in eyes
    person = np.array([own_number(one) for one, _ in eyes]) if eyepacs else persons_by_pixels(hashes)
    train, validation, test = split_by_person(person, test_fraction=APTOS_TEST / APTOS_IMAGES, seed=seed)
    published = abs(len(ids) - APTOS_IMAGES) <= _ABOUT * APTOS_IMAGES and not eyepacs
    return Dataset(
        name="aptos",
        images=images,
        labels=labels,
        grades=GRADES,
        person=person,
        train=train,
        validation=validation,
        test=test,
        sheet=Datasheet(
            source="EyePACS Diabetic Retinopathy Detection (Kaggle, 2015)"
            if eyepacs
            else "APTOS 2019 Blindness Detection (Kaggle, Aravind Eye Hospital)",
            licence="competition data: research use only, never redistribute",
            checksum=content_checksum(images, labels, test),
            notes=(
                f"resized and cropped to {size}x{size} pixels; files of exactly that size are left as they are",
                BOTH_EYES if eyepacs else PIXELS,
            ),
            persons=BOTH_EYES if eyepacs else PIXELS,
            patients=APTOS_IMAGES - APTOS_TEST if published else None,
            proportions={} if eyepacs else {"grade": dict(zip(GRADES, GRADE_PROPORTIONS, strict=True))},
        ),
    )
