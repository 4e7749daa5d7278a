"""A black box to try recovery on: scikit-learn's MLP on its digits, asked for the scores of the ten classes.

python -m distrecon.recover --teacher examples.black_box:scores --input-size 64 --activation tanh
"""

import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

warnings.simplefilter("ignore", ConvergenceWarning)  # 200 epochs are enough here
images, labels = load_digits(return_X_y=True)
classifier = MLPClassifier((20,), activation="tanh", alpha=0.1, max_iter=200, random_state=0, tol=0)
classifier.fit((images - images.mean()) / images.std(), labels)


def scores(inputs_QI: torch.Tensor) -> torch.Tensor:
    """Scores [Q, 10] before the softmax, in float64, of images [Q, 64] in deviations from the mean pixel."""
    (first, second), (bias, shift) = classifier.coefs_, classifier.intercepts_
    return torch.from_numpy(np.tanh(inputs_QI.numpy() @ first + bias) @ second + shift)
