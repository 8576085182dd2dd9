//! Folds batch normalisations into the convolutions before them.
