"""What every source and every sink has to keep; one suite runs over all of them."""
