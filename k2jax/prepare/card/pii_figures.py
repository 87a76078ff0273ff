"""What tools/bench/pii.py --write counted; tests/test_pii.py counts it again."""

FIGURES = {
    "sample_sha256": "f5efc7a309db4f8c6710e29a55e510f4497fb68a767107e1815a5dbf6fb97d34",
    "lines": 324,
    "versions": {
        "datatrove": "0.10.1",
        "phonenumberslite": "9.0.42"
    },
    "rules": {
        "k2jax": {
            "email": {
                "labelled": 23,
                "found": 23,
                "right": 22
            },
            "ipv4": {
                "labelled": 18,
                "found": 17,
                "right": 17
            },
            "ipv6": {
                "labelled": 11,
                "found": 11,
                "right": 11
            },
            "phone, with its country's code": {
                "labelled": 83,
                "found": 81,
                "right": 81
            },
            "phone, as in its country": {
                "labelled": 77,
                "found": 72,
                "right": 72
            }
        },
        "datatrove": {
            "email": {
                "labelled": 23,
                "found": 27,
                "right": 22
            },
            "ipv4": {
                "labelled": 18,
                "found": 33,
                "right": 17
            },
            "ipv6": {
                "labelled": 11,
                "found": 0,
                "right": 0
            },
            "phone, with its country's code": {
                "labelled": 83,
                "found": 0,
                "right": 0
            },
            "phone, as in its country": {
                "labelled": 77,
                "found": 0,
                "right": 0
            }
        }
    }
}
