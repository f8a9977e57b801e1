"""Steps whose loss or gradient is NaN or inf: kept from being taken, looked into, reported."""
