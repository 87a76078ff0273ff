"""What tools/bench/pii.py --write counted; tests/test_pii.py counts it again."""

FIGURES = {
    "sample_sha256": "952168fac9288a216526c0b8fb47cf731e5383cee4945aebf2f5f1f511c70cb0",
    "lines": 391,
    "versions": {
        "datatrove": "0.10.1",
        "phonenumberslite": "9.0.42"
    },
    "rules": {
        "k2jax": {
            "email": {
                "labelled": 27,
                "found": 27,
                "right": 25
            },
            "ipv4": {
                "labelled": 21,
                "found": 21,
                "right": 21
            },
            "ipv6": {
                "labelled": 13,
                "found": 13,
                "right": 13
            },
            "phone, with its country's code": {
                "labelled": 103,
                "found": 100,
                "right": 100
            },
            "phone, as in its country": {
                "labelled": 100,
                "found": 94,
                "right": 93
            }
        },
        "datatrove": {
            "email": {
                "labelled": 27,
                "found": 31,
                "right": 25
            },
            "ipv4": {
                "labelled": 21,
                "found": 44,
                "right": 20
            },
            "ipv6": {
                "labelled": 13,
                "found": 0,
                "right": 0
            },
            "phone, with its country's code": {
                "labelled": 103,
                "found": 0,
                "right": 0
            },
            "phone, as in its country": {
                "labelled": 100,
                "found": 0,
                "right": 0
            }
        }
    }
}
