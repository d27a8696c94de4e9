"""What training is made of, beside the dictionary in training and the steps of a cohort."""
