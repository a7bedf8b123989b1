"""Problems, answer extraction and reward functions."""
