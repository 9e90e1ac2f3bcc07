"""DF-DearKD: training images made out of a trained CNN (section 4)."""
